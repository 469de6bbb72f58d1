"""What DeepSpeed does in Python again and again with the same result, done once.

A step of InternImage-H visits some thousand modules and parameters; at every one DeepSpeed (0.19)
asks which rank it is before it prints nothing, walks through submodules for a list that never
changes, opens NVTX ranges, and inspects signatures. None of this changes a value. Collectives are
the subject of `coalesced`, linear layers that of `linear`. Stages 1 and 2 visit no modules; there
the host would wait for the device where the device can wait for itself.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import (
    parameter_offload,
    partition_parameters,
    partitioned_param_coordinator,
    stage3,
)
from deepspeed.utils import nvtx
from torch import nn

from m3i_scale.engine import coalesced, linear, shards

_ALL = "_all_parameters"  # attribute of a module, once its parameters were listed


def prepare() -> None:
    """Before the networks are built: replace what costs time at every module or parameter."""
    coalesced.install()
    nvtx.enable_nvtx = False
    for module in (partition_parameters, partitioned_param_coordinator, parameter_offload, stage3):
        if hasattr(module, "print_rank_0"):
            module.print_rank_0 = _print_if_asked
        if hasattr(module, "iter_params"):
            module.iter_params = _parameters
    partition_parameters.zero3_linear_wrap = linear.linear


def finish(zero_optimizer: Any, model: nn.Module) -> None:
    """After `deepspeed.initialize` at stage 3: its hooks and its streams are there."""
    for module in model.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            if name in module.__dict__:
                _remember_signature(module.__dict__[name])
    shards.needed(zero_optimizer, "get_grad_norm_direct")
    zero_optimizer.get_grad_norm_direct = group_norm
    stream = zero_optimizer.reduce_and_partition_stream
    # Offloaded gradients are read by the host, which has to wait for them.
    if stream is not None and not zero_optimizer.offload_optimizer:
        order_by_device(stream, get_accelerator().current_stream)


def finish_flat(zero_optimizer: Any) -> None:
    """After `deepspeed.initialize` at stages 1 and 2: waits of the host that nothing needs."""
    shards.needed(
        zero_optimizer, "reduction_stream", "independent_gradient_partition_epilogue",
        "averaged_gradients", "scaled_global_norm", "unscale_and_clip_grads", "clip_grad",
    )  # fmt: skip
    stream = zero_optimizer.reduction_stream
    if stream is not None:
        epilogue = zero_optimizer.independent_gradient_partition_epilogue
        zero_optimizer.independent_gradient_partition_epilogue = functools.partial(
            _ordered, epilogue, get_accelerator(), stream
        )
    zero_optimizer.scaled_global_norm = functools.partial(_global_norm, zero_optimizer)
    zero_optimizer.unscale_and_clip_grads = functools.partial(_unscale_and_clip, zero_optimizer)


def _ordered(function: Callable[[], None], accelerator: Any, stream: Any) -> None:
    """Call a function that waits for the whole device; let the current stream wait for `stream`.

    At the end of every backward pass gradients are still being reduced on that stream. Memory that
    is freed then is used again on the current stream only.
    """
    waits = accelerator.synchronize
    accelerator.synchronize = lambda *_: accelerator.current_stream().wait_stream(stream)
    try:
        function()
    finally:
        accelerator.synchronize = waits


@torch.no_grad()
def group_norm(gradients: list[torch.Tensor], parameters: object) -> torch.Tensor:
    """`get_grad_norm_direct` of one group, bit for bit; -1 if it is not finite (a collective).

    DeepSpeed converts, and reduces, one parameter after the other. All ranks hold different parts:
    nothing here is model parallel.
    """
    norms = torch._foreach_norm(gradients, 2.0, dtype=torch.float64)
    total = torch.stack(norms).pow(2.0).sum()
    dist.all_reduce(total)
    norm = total**0.5
    return norm.masked_fill(~norm.isfinite(), -1.0)


@torch.no_grad()
def _global_norm(zero_optimizer: Any) -> torch.Tensor:
    """`scaled_global_norm` of all groups at once, with one collective; -1 if it is not finite.

    DeepSpeed has a collective, and copies a number to the device, for every parameter group.
    """
    gradients: list[torch.Tensor] = []
    for group in zero_optimizer.averaged_gradients.values():
        flat = getattr(group, "flat_partition", None)
        gradients += group if flat is None else [flat]
    norms = torch.stack(torch._foreach_norm(gradients, dtype=torch.float32))
    total = norms.square().sum()
    dist.all_reduce(total)
    return total.sqrt().masked_fill(~total.isfinite(), -1.0)


def _unscale_and_clip(
    zero_optimizer: Any, gradients: Iterable[torch.Tensor], norm: torch.Tensor | None
) -> None:
    """`unscale_and_clip_grads` without asking once more, for every group, whether it is finite.

    ZeRO's step has skipped the update where the norm is not.
    """
    scale = zero_optimizer.loss_scale
    if zero_optimizer.clip_grad > 0:
        clip = (norm / scale + 1e-6) / zero_optimizer.clip_grad
        scale = clip.clamp(min=1.0) * scale
    elif scale == 1:
        return
    for gradient in gradients:
        gradient.mul_(1.0 / scale)


def order_by_device(stream: Any, current: Callable[[], Any]) -> None:
    """Where the host would wait for a stream, let the current stream wait for it instead.

    DeepSpeed waits so at the end of every backward pass for the last gradients, which the device
    alone goes on to use.
    """
    stream.synchronize = lambda: current().wait_stream(stream)


def _remember_signature(function: Any) -> None:
    """Of an autograd function, which torch inspects at every call."""
    function.forward.__signature__ = inspect.signature(function.forward)


def _print_if_asked(message: Any, debug: bool = False, force: bool = False) -> None:
    """`print_rank_0`, which asks for the rank even where there is nothing to print."""
    if debug or force:
        _print_rank_0(message, debug=debug, force=force)


_print_rank_0 = partition_parameters.print_rank_0


def _parameters(module: nn.Module, recurse: bool = False) -> Iterable[nn.Parameter]:
    """`iter_params`: a module's parameters, with those inside or not, and registered others."""
    if recurse:
        own = module.__dict__.get(_ALL)
        if own is None:
            own = module.__dict__[_ALL] = tuple(module.parameters())
    else:
        own = [p for p in module._parameters.values() if p is not None]
    others: dict[str, Any] = module.__dict__.get("_external_params") or {}
    return itertools.chain(own, others.values())
