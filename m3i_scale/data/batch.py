"""What one micro-batch of the stream is: uint8 views, their geometry, and the targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

PHOTOMETRIC_FIELDS = (
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "order",
    "grayscale",
    "blur_sigma",
    "solarize",
)


B = TypeVar("B", bound="TensorFields")


class TensorFields:
    """A dataclass whose tensors change together, those in mappings and tuples among them."""

    def map(self: B, function: Callable[[Tensor], Tensor]) -> B:
        """Return the same with `function` applied to every tensor."""
        own: Any = self
        changed = {f.name: _mapped(getattr(self, f.name), function) for f in fields(own)}
        return cast(B, replace(own, **changed))

    def pin_memory(self: B) -> B:
        """Copy into page-locked memory, from which a copy to the device is asynchronous."""
        return self.map(lambda tensor: tensor.pin_memory())

    def to(self: B, device: torch.device | str, *, non_blocking: bool = True) -> B:
        """Move every tensor to `device`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, TensorFields):
        return value.map(function)
    if isinstance(value, dict):
        return {name: _mapped(inside, function) for name, inside in value.items()}
    if isinstance(value, tuple):
        return tuple(_mapped(inside, function) for inside in value)
    return value


@dataclass
class Batch(TensorFields):
    """One micro-batch of B samples as CPU or device tensors; S is the view size, L the text length.

    The views are cropped and flipped but photometrically untouched: the photometric fields say
    what is still to be done to them on the device.  Samples 2k and 2k+1 are the pair of one mix.
    """

    view_a: Tensor  # uint8 (B, S, S, 3)
    view_b: Tensor  # uint8 (B, S, S, 3), another crop of the same image
    box_a: Tensor  # float32 (B, 4): top, left, height, width in pixels of the decoded image
    box_b: Tensor  # float32 (B, 4)
    flip_a: Tensor  # bool (B,), True where the crop was mirrored left-right
    flip_b: Tensor  # bool (B,)
    photometric_a: dict[str, Tensor]  # the PHOTOMETRIC_FIELDS, one row per sample
    photometric_b: dict[str, Tensor]
    tokens: Tensor  # int64 (B, L)
    token_mask: Tensor  # bool (B, L), True on real tokens
    has_text: Tensor  # bool (B,), False: the tokens are those of the empty string
    category: Tensor  # int64 (B,), -1 where there is none
    mask: Tensor  # bool (B, gh, gw), True where image i of the mix is seen
    position: Tensor  # int64 (B,), global stream positions
    key: list[str]  # "source/shard/key", for logs

    def __len__(self) -> int:
        return self.position.shape[0]
