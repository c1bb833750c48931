"""Quantizers: the grid, the step's start, and one file per method."""
