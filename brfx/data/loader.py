"""Batches of a split, shuffled and augmented."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from brfx.data.datasets import Split
from brfx.data.image_files import ImageFiles
from brfx.data.preprocessing import Preprocessing
from brfx.errors import ConfigError


@dataclass(frozen=True)
class Parts:
    """Where the batches of an epoch lie in its order, and in each this rank's equal part.

    Attributes:
        samples: of the epoch.
        batch_size, drop_last, rank, world_size: as in :class:`BatchLoader`.

    Raises:
        ConfigError: ``batch_size`` does not split evenly, or there is no such rank.
    """

    samples: int
    batch_size: int
    drop_last: bool = False
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        rank, world_size = self.rank, self.world_size
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank!r}, world_size={world_size!r}: takes a rank below world_size")
        if self.batch_size % world_size:
            raise ConfigError(
                f"batch_size={self.batch_size!r}: takes a multiple of world_size={world_size!r}, an equal part for each"
            )

    def __len__(self) -> int:
        """Batches an epoch, those of all ranks together."""
        whole, rest = divmod(self.samples, self.batch_size)
        return whole + (1 if rest and not self.drop_last and rest % self.world_size == 0 else 0)

    def starting_at(self, batch: int) -> list[slice]:
        """This rank's part of each batch from the ``batch``-th on, counted from 0."""
        if batch < 0:
            raise ConfigError(f"batch={batch!r}: takes 0 or more")
        starts = range(batch * self.batch_size, len(self) * self.batch_size, self.batch_size)
        sizes = [min(self.batch_size, self.samples - start) // self.world_size for start in starts]
        return [
            slice(start + self.rank * size, start + (self.rank + 1) * size)
            for start, size in zip(starts, sizes, strict=True)
        ]


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """What an epoch's order and augmentation are drawn from."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


class BatchLoader:
    """Batches ``(images, labels)`` of a split, normalized, on ``device``; labels may be masks ``(batch, S, S)``.

    With ``augment``, each image is shifted by up to an eighth of its side and, if ``flip``, mirrored with probability
    one half, for the whole batch at once. Order and augmentation are functions of (seed, epoch, sample) alone. A mask
    goes with its image, and what comes in at its edges is of no class (255).

    Args:
        split: the images.
        preprocessing: how they are normalized.
        batch_size: images a batch; the last batch of an epoch may be smaller.
        augment: shuffle and augment; otherwise the order is the split's own.
        drop_last: leave a smaller last batch out.
        seed: of order and augmentation.
        device: where the batches go.
        rank, world_size: yield the ``rank``-th of ``world_size`` equal parts of every batch; the parts of all ranks, in
            their order, are the batch of a single process. A smaller last batch that does not split evenly is left out.

    Raises:
        ConfigError: ``batch_size`` does not split evenly, or there is no such rank.
    """

    def __init__(
        self,
        split: Split,
        preprocessing: Preprocessing,
        batch_size: int,
        *,
        augment: bool = False,
        flip: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.parts = Parts(len(split), batch_size, drop_last, rank, world_size)
        self.split, self.preprocessing, self.device = split, preprocessing, torch.device(device)
        self.augment, self.flip, self.seed = augment, flip, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches an epoch, those of all ranks together."""
        return len(self.parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.starting_at(0)

    def starting_at(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch from its ``batch``-th on, counted from 0; what goes before is neither decoded nor augmented."""
        parts, samples = self.parts.starting_at(batch), len(self.split)
        order = torch.arange(samples)
        if self.augment:
            generator = epoch_generator(self.seed, self.epoch)
            order = torch.randperm(samples, generator=generator)
            reach = max(1, self.preprocessing.image_size // 8)
            shifts = torch.randint(0, 2 * reach + 1, (samples, 2), generator=generator)
            mirrored = torch.rand(samples, generator=generator) < (0.5 if self.flip else 0.0)
            shifts, mirrored = self._copy(shifts[order]), self._copy(mirrored[order])
        labels = self._copy(self.split.labels[order])
        for part, images in zip(parts, self._images([order[part] for part in parts]), strict=True):
            images, targets = self._copy(images), labels[part]
            if self.augment:
                images = _shift_and_mirror(images, shifts[part], mirrored[part], reach)
            if self.augment and targets.dim() > 1:
                targets = _shift_and_mirror(targets[:, None], shifts[part], mirrored[part], reach, fill=255)[:, 0]
            yield self.preprocessing.normalize(images), targets.long()

    def _images(self, order: Sequence[Tensor]) -> Iterator[Tensor]:
        """The uint8 batches of these indices."""
        images = self.split.images
        if isinstance(images, ImageFiles):
            return images.batches(order, pin=self.device.type == "cuda")
        return (images[chosen] for chosen in order)

    def _copy(self, values: Tensor) -> Tensor:
        """``values`` on the device; a GPU copies from pinned memory, and nobody waits for it."""
        if self.device.type == "cuda":
            values = values.pin_memory()
        return values.to(self.device, non_blocking=True)


def _shift_and_mirror(images: Tensor, shifts: Tensor, mirrored: Tensor, reach: int, fill: int = 0) -> Tensor:
    """Crop each image at its own offset out of the batch padded with ``fill``, and mirror the marked ones."""
    count, _, height, width = images.shape
    windows = F.pad(images, (reach, reach, reach, reach), value=fill).unfold(2, height, 1).unfold(3, width, 1)
    cropped = windows[torch.arange(count, device=images.device), :, shifts[:, 0], shifts[:, 1]]
    return torch.where(mirrored.view(-1, 1, 1, 1), cropped.flip(-1), cropped)
