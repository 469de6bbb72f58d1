"""Batches of random views, texts and categories in the type and sizes of the real stream."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from m3i_scale.config import Config, Photometric
from m3i_scale.data.batch import Batch
from m3i_scale.data.views import DRAWS_PER_VIEW, photometric_parameters
from m3i_scale.objective.masks import PatchMask

_DIFFERENT = 2  # batches drawn, which are then repeated: drawing is not what is measured


class SyntheticStream:
    """Samples that were never on a disk, as a `m3i_scale.engine.loop.Stream` without end."""

    epoch_samples = 10**9

    def __init__(self, config: Config) -> None:
        self._config = config

    def loader(self, *, micro_batch: int, rank: int, pin_memory: bool, **_: Any) -> Iterator[Batch]:
        """Micro-batches of this rank; every rank has other ones."""
        rng = np.random.default_rng([self._config.seed, rank])
        batches = [random_batch(self._config, micro_batch, rng) for _ in range(_DIFFERENT)]
        if pin_memory:
            batches = [batch.pin_memory() for batch in batches]
        return itertools.cycle(batches)


def random_batch(config: Config, size: int, rng: np.random.Generator) -> Batch:
    """Draw `size` samples, each with a text and a category where the networks know them."""
    side, text = config.data.image_size, config.model.text
    sampler = PatchMask.of(config.objective.input, side)
    length = text.max_length if text else 0
    words = rng.integers(min(2, length), length + 1, (size, 1))
    drawn: dict[str, Any] = {
        "view_a": rng.integers(0, 256, (size, side, side, 3), dtype=np.uint8),
        "view_b": rng.integers(0, 256, (size, side, side, 3), dtype=np.uint8),
        "box_a": _boxes(size, rng),
        "box_b": _boxes(size, rng),
        "flip_a": rng.random(size) < 0.5,
        "flip_b": rng.random(size) < 0.5,
        "tokens": rng.integers(1, text.vocab_size if text else 2, (size, length)),
        "token_mask": np.arange(length) < words,
        "has_text": np.full(size, text is not None),
        "category": rng.integers(0, max(1, config.model.categories), size),
        "mask": np.stack([sampler(rng) for _ in range(size)]),
        "position": np.arange(size),
    }
    if not config.model.categories:
        drawn["category"][:] = -1
    views = config.data.augmentation
    return Batch(
        photometric_a=_photometric(views.view_a, size, rng),
        photometric_b=_photometric(views.view_b, size, rng),
        key=[f"synthetic/{n}" for n in range(size)],
        **{name: torch.from_numpy(values) for name, values in drawn.items()},
    )


def _boxes(size: int, rng: np.random.Generator) -> np.ndarray:
    """Crops of images of 300 to 500 pixels: top, left, height, width."""
    return np.hstack([rng.uniform(0, 100, (size, 2)), rng.uniform(100, 400, (size, 2))]).astype(
        "f4"
    )


def _photometric(
    strength: Photometric, size: int, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    draws = rng.random((size, DRAWS_PER_VIEW))
    rows = photometric_parameters(draws, strength)
    return {name: torch.from_numpy(values) for name, values in rows.items()}
