"""Random masks over patches: where an input shows image i, and where image j or nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from m3i_scale.config import Input


@dataclass(frozen=True)
class PatchMask:
    """Draws boolean masks over a grid of patches, True where image i is seen.

    Exactly `round(ratio * rows * columns)` patches are False, in every mask, so that every sample
    of a batch shows the same number of tokens.

    `block` (arXiv 2211.09807, Section 3 and Table 7: "blockwise, 50 %") removes rectangles of
    random size and aspect until the ratio is reached; the last rectangle is cut row by row to fit
    exactly.
    `random` removes single patches.
    """

    rows: int
    columns: int
    ratio: float
    kind: str
    aspect: tuple[float, float] = (0.3, 1 / 0.3)

    @classmethod
    def of(cls, spec: Input, image_size: int) -> PatchMask:
        """The masks that the input of an objective wants for square images of that size.

        Raises:
            ValueError: the mask would hide all patches, or none.
        """
        side = image_size // spec.patch
        return cls(side, side, spec.ratio, spec.mask)

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

    @cached_property
    def _stacked(self) -> list[int]:
        """The first patch of each of n rows as bits, for n = 0 ... rows."""
        return [sum(1 << self.columns * row for row in range(n)) for n in range(self.rows + 1)]

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
        size = self.rows * self.columns
        seen, missing = (1 << size) - 1, self.hidden
        while missing > 0:
            for draws in rng.random((8, 4)).tolist():
                block = self._rectangle(draws, missing) & seen
                count = block.bit_count()
                if count >= missing:
                    seen ^= _first_bits(block, missing)  # the last one, cut from its end
                    missing = 0
                    break
                seen ^= block
                missing -= count
        packed = np.frombuffer(seen.to_bytes(-(-size // 8), "little"), np.uint8)
        bits = np.unpackbits(packed, count=size, bitorder="little")
        return bits.view(bool).reshape(self.rows, self.columns)

    def _rectangle(self, draws: list[float], missing: int) -> int:
        """A rectangle of at most about `missing` patches as bits, from four uniform draws."""
        size, shape, down, right = draws
        rows, columns = self.rows, self.columns
        least = min(rows * columns // 12 or 1, missing)
        area = least + (missing - least) * size
        low, high = self.aspect
        aspect = low * (high / low) ** shape
        height = min(round(math.sqrt(area * aspect)) or 1, rows)
        width = min(round(math.sqrt(area / aspect)) or 1, columns)
        # It may hang over the border: placed inside, corners would hardly ever be hidden.
        top = math.floor(1 - height + (rows - 1 + height) * down)
        left = math.floor(1 - width + (columns - 1 + width) * right)
        end = min(left + width, columns)
        row = (1 << end) - (1 << left) if left > 0 else (1 << end) - 1
        # Rows below the grid are no bits of a mask.
        rectangle = row * self._stacked[height]
        return rectangle << columns * top if top > 0 else rectangle >> columns * -top


def _first_bits(block: int, count: int) -> int:
    """The `count` lowest of the bits that are set in `block`, of at least as many."""
    low, high = 0, block.bit_length()
    while low < high:  # the fewest places that hold so many
        middle = (low + high) // 2
        if (block & ((1 << middle) - 1)).bit_count() < count:
            low = middle + 1
        else:
            high = middle
    return block & ((1 << low) - 1)
