"""The official CUDA extensions of DCNv3 and DCNv4, where somebody managed to build them.

Both are wrapped to compute our function, so that the same check covers them: they have neither the
softmax nor the blend with the centre feature, which torch does around them, as in InternImage.
"""

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Core = Callable[[Tensor, Tensor, Tensor], Tensor]

# kernel, stride, padding, dilation of every DCNv3 in InternImage, each for height and width
_GEOMETRY = (3, 3, 1, 1, 1, 1, 1, 1)
_IM2COL_STEP = 256


def dcn_operators(groups: int, is_logits: bool) -> dict[str, Callable[..., Tensor]]:
    """Map names to the official operators that can be imported, with our keywords.

    They are compared in float16: DCNv3 has no bfloat16, and DCNv4's backward refuses it.
    """
    found: dict[str, Callable[..., Tensor]] = {}
    if importlib.util.find_spec("DCNv3") is not None:
        found["official DCNv3"] = _surrounded(_dcnv3(groups), groups, is_logits)
    if importlib.util.find_spec("DCNv4") is not None:
        found["official DCNv4"] = _surrounded(_dcnv4(groups), groups, is_logits)
    return found


def _surrounded(core: Core, groups: int, is_logits: bool) -> Callable[..., Tensor]:
    def call(x: Tensor, offset: Tensor, mask: Tensor, center_scale: Tensor | None = None) -> Tensor:
        if is_logits:
            mask = mask.unflatten(-1, (groups, -1)).softmax(-1).flatten(-2)
        y = core(x, offset, mask)
        if center_scale is None:
            return y
        scale = center_scale.repeat_interleave(x.shape[-1] // groups, -1)
        return y * (1 - scale) + x * scale

    return call


def _dcnv3(groups: int) -> Core:
    import DCNv3

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
            ctx.save_for_backward(x, offset, mask)
            ctx.geometry = (*_GEOMETRY, groups, x.shape[-1] // groups, 1.0)
            return DCNv3.dcnv3_forward(x, offset, mask, *ctx.geometry, _step(x), False)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            saved = ctx.saved_tensors
            last = (grad.contiguous(), _step(grad), False)
            return tuple(DCNv3.dcnv3_backward(*saved, *ctx.geometry, *last))

    return Function.apply


def _dcnv4(groups: int) -> Core:
    from DCNv4.functions import DCNv4Function

    def call(x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        packed = torch.cat(
            (offset.unflatten(-1, (groups, -1)), mask.unflatten(-1, (groups, -1))), -1
        )
        packed = packed.flatten(-2)
        missing = math.ceil(packed.shape[-1] / 8) * 8 - packed.shape[-1]
        packed = torch.nn.functional.pad(packed, (0, missing)).contiguous()
        last = (groups, x.shape[-1] // groups, 1.0, _step(x), False)
        return DCNv4Function.apply(x, packed, *_GEOMETRY, *last)

    return call


def _step(x: Tensor) -> int:
    return math.gcd(x.shape[0], _IM2COL_STEP)
