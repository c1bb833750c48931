"""The observer: a marker in front of an activation quantizer whose input is regularized."""

from torch import Tensor, nn


class ActivationObserver(nn.Module):
    """Identity in front of an activation quantizer.

    In the plain graph it does nothing. :func:`brfx.analysis.observe.observed_forward` makes a second forward over the
    same modules in which every observed tensor is returned beside the output; that is what ``brfx.observe`` and
    ``brfx.BinPenalty`` run. Nothing is stored on the module, so the forward compiles without a graph break.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x
