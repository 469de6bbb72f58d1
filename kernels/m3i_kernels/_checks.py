"""Argument checks shared by the operators: each raises `ValueError` naming argument and value."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def pair(name: str, value: int | Sequence[int], minimum: int) -> tuple[int, int]:
    """Return `value` as (height, width); both must be integers of at least `minimum`."""
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or any(not isinstance(v, int) or v < minimum for v in both):
        raise ValueError(
            f"{name} is {value!r}, but must be an integer or (height, width), "
            f"each at least {minimum}"
        )
    return both[0], both[1]


def tensor_like(
    name: str,
    tensor: Tensor,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    meaning: str,
) -> None:
    """Check shape, dtype and device of `tensor`; `meaning` says what the shape stands for."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but must be {tuple(shape)} = {meaning}"
        )
    dtype_of(name, tensor, dtypes)
    if tensor.device != device:
        raise ValueError(
            f"{name} is on {tensor.device}, but must be on {device} as the first input"
        )


def dtype_of(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Check that the dtype of `tensor` is among `dtypes`."""
    if tensor.dtype not in dtypes:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name} has dtype {tensor.dtype}, but must be one of {accepted}")


def images_uint8(name: str, images: Tensor) -> tuple[int, int, int]:
    """Check that `images` is uint8 (B, H, W, 3) and not empty; return (B, H, W)."""
    if images.dim() != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(
            f"{name} has shape {tuple(images.shape)}, but must be (B, H, W, 3), not empty"
        )
    dtype_of(name, images, (torch.uint8,))
    return images.shape[0], images.shape[1], images.shape[2]


def values(name: str, given: Tensor, valid: Tensor, rule: str) -> None:
    """Check the values of the argument `given`, which has one row per sample, as has `valid`.

    On the CPU a violation raises `ValueError` at once. On a GPU looking at the values would stall
    the queue, so the condition becomes a device-side assertion.
    """
    if valid.device.type == "cpu":
        if not torch.compiler.is_compiling() and not bool(valid.all()):
            row = int(valid.reshape(len(valid), -1).all(1).int().argmin())
            raise ValueError(f"{name}[{row}] is {given[row].tolist()}, but must be {rule}")
    else:
        torch._assert_async(valid.all(), f"{name}: every value must be {rule}")


def normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    """Check the per-channel statistics of images in [0, 1]."""
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(
            f"mean is {mean!r} and std is {std!r}, but both need one value per channel, 3"
        )
    if any(s <= 0 for s in std):
        raise ValueError(f"std is {std!r}, but every value must be positive")


def memory_format(name: str) -> torch.memory_format:
    """Return torch's memory format called `name`: `channels_last` or `contiguous`."""
    formats = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
    if name not in formats:
        raise ValueError(f"memory_format is {name!r}, but must be one of {', '.join(formats)}")
    return formats[name]
