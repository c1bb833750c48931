"""Penalties on weights and activations that join the loss. The ones that are made for a rewritten model are not loaded
here, so that the trainer, which knows their protocol, imports no quantizer."""

from brfx.regularizers.regularizer import Regularizer, Regularizers, WeightTerm

__all__ = ["Regularizer", "Regularizers", "WeightTerm"]
