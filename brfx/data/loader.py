"""Batches of a split, shuffled and augmented."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brfx.config import Augmentation
from brfx.data.augmentation import Erase, Mix, VaryImage, shift_and_mirror
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

    With ``augment``, order and augmentation are functions of (seed, epoch, sample) alone, and how images are mixed of
    (seed, epoch, batch). By default each image is shifted by up to an eighth of its side and, if ``flip``, mirrored
    with probability one half, for the whole batch at once. A mask goes with its image, and what comes in at its edges
    is of no class (255). Labels of mixed images are shares of the classes, float ``(batch, num_classes)``.

    Args:
        split: the images.
        preprocessing: how they are normalized.
        batch_size: images a batch; the last batch of an epoch may be smaller.
        augment: shuffle and augment, as an :class:`~brfx.config.Augmentation` says; ``True``: by shifts, and mirrored
            if ``flip``; otherwise the order is the split's own.
        drop_last: leave a smaller last batch out.
        seed: of order and augmentation.
        num_classes: needed where images are mixed.
        device: where the batches go.
        rank, world_size: yield the ``rank``-th of ``world_size`` equal parts of every batch; the parts of all ranks, in
            their order, are the batch of a single process. A smaller last batch that does not split evenly is left out.

    Raises:
        ConfigError: ``batch_size`` does not split evenly, or there is no such rank; masks are to be mixed, or varied by
            more than a shift.
    """

    def __init__(
        self,
        split: Split,
        preprocessing: Preprocessing,
        batch_size: int,
        *,
        augment: bool | Augmentation = False,
        flip: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        num_classes: int = 0,
    ) -> None:
        self.parts = Parts(len(split), batch_size, drop_last, rank, world_size)
        if augment is True:
            augment = Augmentation(flip=flip)
        self.split, self.preprocessing, self.device = split, preprocessing, torch.device(device)
        self.augment, self.seed = augment or None, seed
        if augment and split.labels.dim() > 1 and (augment.per_image or augment.mixes or augment.erasing):
            raise ConfigError(f"augmentation by {augment}: masks are shifted and mirrored alone")
        if augment and augment.mixes and num_classes < 1:
            raise ConfigError(f"augmentation by {augment}: mixed labels are shares of the classes: give num_classes")
        self.mix = Mix(augment, num_classes) if augment and augment.mixes else None
        self.borrowed = 1 if self.mix is not None and world_size > 1 else 0  # images of another rank's, to mix with
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
        parts = self.parts.starting_at(batch)
        if self.augment is None:
            labels, order = self._copy(self.split.labels), torch.arange(len(self.split))
            for part, images in zip(parts, self._images([order[part] for part in parts]), strict=True):
                yield self.preprocessing.normalize(self._copy(images)), labels[part].long()
            return
        generator = epoch_generator(self.seed, self.epoch)
        draw = _Draw(self.augment, len(self.split), len(self), generator, self.preprocessing)
        shifts, mirrored = self._copy(draw.shifts[draw.order]), self._copy(draw.mirrored[draw.order])
        labels = self._copy(self.split.labels[draw.order])
        erase = Erase(self.augment.erasing) if self.augment.erasing else None
        places = [self._places(part) for part in parts]
        batches = zip(places, self._images([draw.order[place] for place in places], draw.seeds), strict=True)
        for number, (place, images) in enumerate(batches, start=batch):
            images, targets = self._copy(images), labels[place]
            images = shift_and_mirror(images, shifts[place], mirrored[place], draw.reach)
            if targets.dim() > 1:
                targets = shift_and_mirror(targets[:, None], shifts[place], mirrored[place], draw.reach, fill=255)[:, 0]
            images = self.preprocessing.normalize(images)
            if erase is not None:
                images = erase(images, (draw.seeds[draw.order[place]] + 1).tolist())
            if self.mix is None:
                yield images, targets.long()
            else:
                mixed, shares = self.mix(images, targets.long(), int(draw.batch_seeds[number]))
                yield mixed[self.borrowed :], shares[self.borrowed :]

    def _places(self, part: slice) -> slice | Tensor:
        """Of this rank's part of a batch in the epoch's order; in front of it, where images are mixed, of the one that
        the first is mixed with, which another rank has."""
        if not self.borrowed:
            return part
        size = part.stop - part.start
        start, before = part.start - self.parts.rank * size, self.parts.rank * size - 1
        return torch.tensor([start + before % (self.parts.world_size * size), *range(part.start, part.stop)])

    def _images(self, chosen: Sequence[Tensor], seeds: Tensor | None = None) -> Iterator[Tensor]:
        """The uint8 batches of these indices, each image varied on its own where that is wanted."""
        images, pin = self.split.images, self.device.type == "cuda"
        if self.augment is None or seeds is None or not self.augment.per_image:
            if isinstance(images, ImageFiles):
                return images.batches(chosen, pin=pin)
            return (images[indices] for indices in chosen)
        vary = VaryImage(self.augment, self.preprocessing, seeds)
        if isinstance(images, ImageFiles):
            return images.batches(chosen, pin=pin, vary=vary)
        return (vary.all(images[indices], indices) for indices in chosen)

    def _copy(self, values: Tensor) -> Tensor:
        """``values`` on the device; a GPU copies from pinned memory, and nobody waits for it."""
        if self.device.type == "cuda":
            values = values.pin_memory()
        return values.to(self.device, non_blocking=True)


class _Draw:
    """What an epoch's order and augmentation are drawn as, all of it before the first batch.

    Attributes:
        order: ``(samples,)``, the epoch's.
        shifts: ``(samples, 2)``, down and right from -``reach``, counted from 0.
        mirrored: ``(samples,)``.
        seeds, batch_seeds: one for each sample, one for each batch.
    """

    def __init__(
        self,
        augmentation: Augmentation,
        samples: int,
        batches: int,
        generator: torch.Generator,
        preprocessing: Preprocessing,
    ) -> None:
        self.order = torch.randperm(samples, generator=generator)
        self.reach = max(1, preprocessing.image_size // 8) if augmentation.crop == "shift" else 0
        self.shifts = torch.randint(0, 2 * self.reach + 1, (samples, 2), generator=generator)
        self.mirrored = torch.rand(samples, generator=generator) < (0.5 if augmentation.flip else 0.0)
        self.seeds = torch.randint(2**62, (samples,), generator=generator)
        self.batch_seeds = torch.randint(2**62, (batches,), generator=generator)
