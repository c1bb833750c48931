"""From a model's Python to a ``GraphModule``, and what a graph says about its values."""
