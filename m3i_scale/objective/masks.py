"""Random masks over patches: which image of a mix (or which part of an image) is seen where."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PatchMask:
    """Draws boolean masks over a grid of patches, True where image i is seen.

    Exactly `round(ratio * rows * columns)` patches are False, in every mask, so that every sample
    of a batch shows the same number of tokens.

    `block` (section 2 of the method; Table 7 "blockwise, 50 %") removes rectangles of random size
    and aspect until the ratio is reached; the last rectangle is cut row by row to fit exactly.
    `random` removes single patches.
    """

    rows: int
    columns: int
    ratio: float = 0.5
    kind: str = "block"
    aspect: tuple[float, float] = (0.3, 1 / 0.3)

    def __post_init__(self) -> None:
        if self.kind not in ("block", "random"):
            raise ValueError(f"mask kind {self.kind!r} is unknown; use 'block' or 'random'")
        if not 0 < self.hidden < self.rows * self.columns:
            raise ValueError(
                f"mask ratio {self.ratio} hides {self.hidden} of {self.rows}x{self.columns} "
                "patches; some must be hidden and some seen"
            )

    @property
    def hidden(self) -> int:
        """Number of False patches in every mask."""
        return round(self.ratio * self.rows * self.columns)

    def __call__(self, rng: np.random.Generator) -> NDArray[np.bool_]:
        """One mask, bool (rows, columns)."""
        draw = self._blocks if self.kind == "block" else self._patches
        return draw(rng)

    def _patches(self, rng: np.random.Generator) -> NDArray[np.bool_]:
        mask = np.ones(self.rows * self.columns, dtype=bool)
        mask[rng.permutation(mask.size)[: self.hidden]] = False
        return mask.reshape(self.rows, self.columns)

    def _blocks(self, rng: np.random.Generator) -> NDArray[np.bool_]:
        mask = np.ones((self.rows, self.columns), dtype=bool)
        missing = self.hidden
        while missing > 0:
            block = mask[self._rectangle(rng, missing)]
            seen = np.flatnonzero(block)[:missing]
            if len(seen) == block.size:
                block[...] = False
            else:
                block[np.unravel_index(seen, block.shape)] = False
            missing -= len(seen)
        return mask

    def _rectangle(self, rng: np.random.Generator, missing: int) -> tuple[slice, slice]:
        """Rows and columns of a rectangle of at most about `missing` patches."""
        size, shape, down, right = rng.random(4).tolist()  # one call: drawing dominates the cost
        least = min(max(1, self.rows * self.columns // 12), missing)
        area = least + (missing - least) * size
        low, high = map(math.log, self.aspect)
        aspect = math.exp(low + (high - low) * shape)
        height = min(max(round(math.sqrt(area * aspect)), 1), self.rows)
        width = min(max(round(math.sqrt(area / aspect)), 1), self.columns)
        # It may hang over the border: placed inside, corners would hardly ever be hidden.
        top = math.floor(1 - height + (self.rows - 1 + height) * down)
        left = math.floor(1 - width + (self.columns - 1 + width) * right)
        return slice(max(top, 0), top + height), slice(max(left, 0), left + width)
