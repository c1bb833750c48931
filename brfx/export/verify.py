"""Two files of one model, side by side: do they decide the same?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from brfx.errors import ExportError
from brfx.export.integer import integer_model
from brfx.export.onnx import distance
from brfx.export.parity import SiteParity, compare_codes

#: How many images with another decision are listed.
LISTED = 20


@dataclass(frozen=True)
class Verification:
    """The comparison of two files on the same images.

    Attributes:
        images: how many.
        max_difference: largest absolute difference of an output.
        bit_for_bit: whether every output of every image is equal.
        different: how many images have another best class.
        listed: the first of these, by their place in the data.
        accuracy: of each, where labels were given.
        sites: where one file is a trained model, its codes against its integer form's, layer by layer, summed over
            the images.
    """

    images: int
    max_difference: float
    bit_for_bit: bool
    different: int
    listed: tuple[int, ...]
    accuracy: tuple[float, float] | None
    sites: tuple[SiteParity, ...]


@torch.no_grad()
def verify(
    first: Callable[..., list[Tensor]],
    second: Callable[..., list[Tensor]],
    batches: Iterable[tuple[Tensor, Tensor | None]],
    trained: nn.Module | None = None,
) -> Verification:
    """Run both on ``batches`` of ``(images, labels)``, labels ``None`` where there are none.

    Args:
        first, second: see :func:`brfx.export.reading.runner`.
        batches: images ``(N, 3, H, W)`` and class numbers ``(N,)``.
        trained: a trained model whose codes are compared with its integer form's too.
    """
    images = different = 0
    largest, correct, labelled = 0.0, [0, 0], False
    listed: list[int] = []
    sites: dict[str, SiteParity] = {}
    integer = None if trained is None else integer_model(trained)
    for batch, labels in batches:
        a, b = first(batch), second(batch)
        shapes = [[tuple(value.shape) for value in outputs] for outputs in (a, b)]
        if shapes[0] != shapes[1]:
            raise ExportError(f"these are not files of one model: their outputs are {shapes[0]} and {shapes[1]}")
        largest = max(largest, distance(a, b))
        if a[0].dim() == 2:
            decided = a[0].argmax(1), b[0].argmax(1)
            other = (decided[0] != decided[1]).nonzero().flatten().tolist()
            different += len(other)
            listed += [images + place for place in other][: LISTED - len(listed)]
            if labels is not None:
                labelled = True
                correct = [count + int((d == labels).sum()) for count, d in zip(correct, decided, strict=True)]
        images += len(batch)
        if integer is not None and trained is not None:
            for site in compare_codes(trained, integer, batch):
                sites[site.site] = site + sites[site.site] if site.site in sites else site
    if not images:
        raise ExportError("there is nothing to compare on: the data gave no batch")
    accuracy = (correct[0] / images, correct[1] / images) if labelled else None
    return Verification(images, largest, largest == 0.0, different, tuple(listed), accuracy, tuple(sites.values()))
