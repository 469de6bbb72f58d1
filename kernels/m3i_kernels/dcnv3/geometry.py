"""The sampling geometry of deformable convolution v3, shared by all implementations."""

from collections.abc import Sequence
from typing import NamedTuple

from m3i_kernels._checks import pair


class Geometry(NamedTuple):
    """Static parameters of one DCNv3 call; pairs are (height, width)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    offset_scale: float
    remove_center: bool

    @property
    def points(self) -> int:
        """Sampling points per output position and group, K."""
        return self.kernel_size[0] * self.kernel_size[1] - int(self.remove_center)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (Ho, Wo) of an input of height x width positions."""
        sizes = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(
                (height, width),
                self.kernel_size,
                self.stride,
                self.padding,
                self.dilation,
                strict=True,
            )
        ]
        return sizes[0], sizes[1]

    def grid_points(self) -> list[tuple[int, int]]:
        """List the K undeformed points as (x, y) in input pixels from the kernel's centre.

        Column-major, as the published weights need it: point `i * kernel_height + j` is x = i,
        y = j. `remove_center` drops the middle one and closes the gap.
        """
        (kh, kw), (dh, dw) = self.kernel_size, self.dilation
        points = [((i - kw // 2) * dw, (j - kh // 2) * dh) for i in range(kw) for j in range(kh)]
        return [p for p in points if p != (0, 0)] if self.remove_center else points

    def first_center(self) -> tuple[int, int]:
        """Return (y, x) of the kernel's centre at output position (0, 0), in input pixels."""
        return (
            self.dilation[0] * (self.kernel_size[0] // 2) - self.padding[0],
            self.dilation[1] * (self.kernel_size[1] // 2) - self.padding[1],
        )


def make_geometry(
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    offset_scale: float,
    remove_center: bool,
) -> Geometry:
    """Check the static parameters of a call and return them in one tuple.

    Raises:
        ValueError: for an even or missing kernel, non-positive stride, dilation or groups,
            negative padding, or a kernel that has no point left.
    """
    kernel = pair("kernel_size", kernel_size, 1)
    if kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size!r}, but must be odd in both directions")
    if remove_center and kernel == (1, 1):
        raise ValueError("kernel_size is 1 with remove_center=True: no sampling point is left")
    if groups < 1:
        raise ValueError(f"groups is {groups!r}, but must be at least 1")
    return Geometry(
        kernel,
        pair("stride", stride, 1),
        pair("padding", padding, 0),
        pair("dilation", dilation, 1),
        groups,
        float(offset_scale),
        bool(remove_center),
    )
