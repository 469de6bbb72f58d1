"""Views of this rank's ZeRO-3 shards: fp32 weights, Adam moments, compute-precision weights.

DeepSpeed keeps of every parameter with N elements the slice `[rank * k, (rank + 1) * k)` of the
flattened tensor, `k = ceil(N / ranks)`, padded at the end. The views here include the padding;
`checkpoint.extent` says how much of a shard is real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that the optimiser updates."""
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def local_weight(zero_optimizer: Any, parameter: nn.Parameter) -> Tensor:
    """fp32 master shard: a view of the optimiser's storage, on the device where it lives.

    DeepSpeed's `safe_get_local_fp32_param` gives a copy of what is offloaded; written to, it would
    change nothing.
    """
    return _view(zero_optimizer, parameter, lambda flat: flat)


def local_moment(zero_optimizer: Any, parameter: nn.Parameter, moment: str) -> Tensor:
    """Adam moment shard: a view of the optimiser's storage."""
    states = zero_optimizer.optimizer.state
    return _view(zero_optimizer, parameter, lambda flat: states[flat][moment])


def _view(
    zero_optimizer: Any, parameter: nn.Parameter, storage: Callable[[Tensor], Tensor]
) -> Tensor:
    group, offset, count = zero_optimizer.grad_position[zero_optimizer.get_param_id(parameter)]
    return storage(zero_optimizer.fp32_partitioned_groups_flat[group]).narrow(0, offset, count)


def shard(parameter: nn.Parameter) -> Tensor:
    """Compute-precision shard (k,) of a partitioned parameter, a view."""
    return parameter.ds_tensor.data  # type: ignore[attr-defined]


def cut(shards: Tensor, parameter: nn.Parameter) -> Tensor:
    """The whole tensor of a partitioned parameter, a view of all ranks' shards (W, k)."""
    flat = shards.view(-1)[: parameter.ds_numel]  # type: ignore[attr-defined]
    return flat.view(parameter.ds_shape)  # type: ignore[attr-defined]


# Bytes at whose multiples weights begin: kernels of cuDNN, cuBLAS and PyTorch read so many at once,
# and the first two refuse, or find no algorithm for, what begins elsewhere.
ALIGNMENT = 16


def align(parameter: nn.Parameter) -> None:
    """Copy a gathered parameter that begins at an odd place of a flat buffer to one of its own."""
    if parameter.data_ptr() % ALIGNMENT:
        parameter.data = parameter.data.clone()


def share_weights(zero_optimizer: Any) -> None:
    """Keep one copy of the weights where master and compute weights have the same dtype.

    DeepSpeed means to, but on a CPU compares a device with its name and makes a copy.
    """
    pairs = zip(
        zero_optimizer.fp32_partitioned_groups_flat,
        zero_optimizer.fp16_partitioned_groups_flat,
        strict=True,
    )
    for master, weights in pairs:
        if (master.dtype, master.device) == (weights.dtype, weights.device):
            master.data = weights.data


def create_adam_state(zero_optimizer: Any) -> None:
    """Give the inner optimiser the state it would make at its first step.

    So that memory is known from the start, and saving and loading know one case only.
    """
    inner = zero_optimizer.optimizer
    fused = any(group.get("fused") for group in inner.param_groups)
    for flat in zero_optimizer.fp32_partitioned_groups_flat:
        step: Tensor | int = torch.zeros((), device=flat.device if fused else "cpu")
        if not isinstance(inner, torch.optim.AdamW):  # DeepSpeed's CPU Adam counts in an int
            step = 0
        inner.state[flat] = {"step": step} | {m: torch.zeros_like(flat) for m in MOMENTS}


def get_adam_step(zero_optimizer: Any) -> int:
    """Number of updates Adam has made."""
    states = zero_optimizer.optimizer.state.values()
    return int(next(iter(states))["step"])


def set_adam_step(zero_optimizer: Any, step: int) -> None:
    """Set the number of updates Adam has made."""
    for state in zero_optimizer.optimizer.state.values():
        if isinstance(state["step"], Tensor):
            state["step"].fill_(step)
        else:
            state["step"] = step


def publish_weights(zero_optimizer: Any) -> None:
    """After the fp32 master shards were written: refresh the compute-precision weights."""
    for group in range(len(zero_optimizer.fp16_groups)):
        zero_optimizer._reassign_or_swap_out_partitioned_parameters(group)
    zero_optimizer.checkpoint_event_prologue()
    zero_optimizer.checkpoint_event_epilogue()
    # Partitioning gathered parameters has renewed the node's copies (hpZ) from the old weights.
    zero_optimizer.invalidate_secondary_tensor()


@torch.no_grad()
def clamp_weight(zero_optimizer: Any, parameter: nn.Parameter, maximum: float) -> None:
    """Bound a trained parameter from above, in this rank's master and compute-precision shards."""
    local_weight(zero_optimizer, parameter).clamp_(max=maximum)
    forget_gathered(parameter)
    shard(parameter).clamp_(max=maximum)


def copy_shard(source: nn.Parameter, target: nn.Parameter) -> None:
    """Copy the compute-precision shard of one partitioned parameter to another's."""
    shard(target).copy_(shard(source))


def forget_gathered(parameter: nn.Parameter) -> None:
    """Drop gathered copies of a parameter whose shard is about to change."""
    if parameter.ds_status.name == "AVAILABLE":  # type: ignore[attr-defined]
        # A small parameter that ZeRO keeps gathered would go on serving the old value.
        parameter.partition()  # type: ignore[attr-defined]
    # Last: partitioning makes the node's copy (hpZ) anew, from the old value.
    parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]
