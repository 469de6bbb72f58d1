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
        # Patches are the bits of an integer, row after row: a worker draws a mask per sample, and
        # arrays of this size would cost several times as much.
        seen, missing = (1 << self.rows * self.columns) - 1, self.hidden
        while missing > 0:
            for draws in rng.random((8, 4)).tolist():
                if missing == 0:
                    break
                block = self._rectangle(draws, missing) & seen
                while block.bit_count() > missing:  # the last one: cut from its end
                    block ^= 1 << (block.bit_length() - 1)
                seen ^= block
                missing -= block.bit_count()
        packed = np.frombuffer(seen.to_bytes(-(-self.rows * self.columns // 8), "little"), np.uint8)
        bits = np.unpackbits(packed, count=self.rows * self.columns, bitorder="little")
        return bits.astype(bool).reshape(self.rows, self.columns)

    def _rectangle(self, draws: list[float], missing: int) -> int:
        """A rectangle of at most about `missing` patches as bits, from four uniform draws."""
        size, shape, down, right = draws
        least = min(max(1, self.rows * self.columns // 12), missing)
        area = least + (missing - least) * size
        low, high = self.aspect
        aspect = low * (high / low) ** shape
        height = min(max(round(math.sqrt(area * aspect)), 1), self.rows)
        width = min(max(round(math.sqrt(area / aspect)), 1), self.columns)
        # It may hang over the border: placed inside, corners would hardly ever be hidden.
        top = math.floor(1 - height + (self.rows - 1 + height) * down)
        left = math.floor(1 - width + (self.columns - 1 + width) * right)
        bottom, end = min(top + height, self.rows), min(left + width, self.columns)
        row = (1 << end) - (1 << max(left, 0))
        return sum(row << self.columns * number for number in range(max(top, 0), bottom))
