"""Shards at ZeRO stage 3: a slice of every parameter.

DeepSpeed keeps of every parameter with N elements the slice `[rank * k, (rank + 1) * k)` of the
flattened tensor, `k = ceil(N / ranks)`, padded at the end; which is also what a checkpoint's files
hold, without the padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from m3i_scale.engine.checkpoint import Extent, extent
from m3i_scale.engine.shards import ALIGNMENT, Shards, joined, needed


class Partitioned(Shards):
    """Parameters of stage 3, built under `deepspeed.zero.Init`."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        needed(
            optimizer, "grad_position", "fp32_partitioned_groups_flat", "fp16_groups",
            "fp16_partitioned_groups_flat", "averaged_gradients", "offload_optimizer",
        )  # fmt: skip
        self._share_weights()

    def _share_weights(self) -> None:
        """Keep one copy of the weights where master and compute weights have the same dtype.

        DeepSpeed means to, but on a CPU compares a device with its name and makes a copy.
        """
        pairs = zip(self.masters, self.optimizer.fp16_partitioned_groups_flat, strict=True)
        for master, weights in pairs:
            if (master.dtype, master.device) == (weights.dtype, weights.device):
                master.data = weights.data

    @property
    def masters(self) -> list[Tensor]:
        """One of each of DeepSpeed's sub-groups."""
        return list(self.optimizer.fp32_partitioned_groups_flat)

    def extent(self, parameter: nn.Parameter) -> Extent:
        """The slice of this rank."""
        elements: int = parameter.ds_numel  # type: ignore[attr-defined]
        return extent(elements, self.rank, self.size)

    def place(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Index of the sub-group, and offset in it."""
        group, offset, _ = self._position(parameter)
        return group, offset

    def _position(self, parameter: nn.Parameter) -> tuple[int, int, int]:
        found = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        return int(found[0]), int(found[1]), int(found[2])

    def padded_weight(self, parameter: nn.Parameter) -> Tensor:
        """Master weights (k,) with their padding, a view: as many on every rank."""
        group, offset, count = self._position(parameter)
        return self.masters[group].narrow(0, offset, count)

    def publish(self) -> None:
        """Refresh the compute weights' slices and what is gathered of them."""
        zero = self.optimizer
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_prologue()
        zero.checkpoint_event_epilogue()
        # Partitioning gathered parameters has renewed the node's copies (hpZ) from old weights.
        zero.invalidate_secondary_tensor()

    @torch.no_grad()
    def clamp(self, parameter: nn.Parameter, maximum: float) -> None:
        """In this rank's slices."""
        self.weight(parameter).clamp_(max=maximum)
        forget_gathered(parameter)
        shard(parameter).clamp_(max=maximum)

    def flat_weights(self) -> tuple[list[Tensor], bool]:
        """Slices."""
        return list(self.optimizer.fp16_partitioned_groups_flat), False

    def reduced_gradients(self, device: torch.device) -> list[Tensor]:
        """In the optimiser's storage where it is offloaded."""
        if self.optimizer.offload_optimizer:
            return [m.grad.clone() for m in self.masters if m.grad is not None]
        groups = self.optimizer.averaged_gradients
        return [joined(groups[number], device) for number in range(len(self.masters))]

    def drop_gradients(self, model: nn.Module) -> None:
        """As DeepSpeed does where it skips a step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.averaged_gradients = {}
        for parameter in model.parameters():
            forget_gathered(parameter)

    def even(self, parts: list[tuple[nn.Parameter, Tensor]]) -> list[Tensor]:
        """What ranks own is what they write."""
        return [part for _, part in parts]

    def compute_weights(self, model: nn.Module) -> Iterator[Tensor]:
        """Slices."""
        return (shard(p) for p in model.parameters() if p.requires_grad)

    def frozen_weights(self, model: nn.Module) -> Iterator[Tensor]:
        """Slices."""
        return (shard(p) for p in model.parameters() if not p.requires_grad)

    def gathered_weights(self, model: nn.Module) -> Iterator[Tensor]:
        """Of the small parameters that ZeRO keeps gathered; a single rank's are the slices."""
        return (p.data for p in model.parameters() if _is_gathered(p))

    def gradients(self) -> list[Tensor]:
        """Slices."""
        return [self.optimizer.grad_partitions_flat_buffer]

    def buckets(self) -> list[Tensor]:
        """One of each dtype that is sent."""
        found = (bucket.buffer for bucket in self.optimizer.ipg_buckets.values())
        return [buffer for buffer in found if buffer is not None]


# ------------------------------------------------------------------------ of partitioned parameters


def shard(parameter: nn.Parameter) -> Tensor:
    """Compute-precision shard (k,) of a partitioned parameter, a view."""
    return parameter.ds_tensor.data  # type: ignore[attr-defined]


def cut(shards: Tensor, parameter: nn.Parameter) -> Tensor:
    """The whole tensor of a partitioned parameter, a view of all ranks' shards (W, k)."""
    flat = shards.view(-1)[: parameter.ds_numel]  # type: ignore[attr-defined]
    return flat.view(parameter.ds_shape)  # type: ignore[attr-defined]


def align(parameter: nn.Parameter) -> None:
    """Copy a gathered parameter that begins at an odd place of a flat buffer to one of its own."""
    if parameter.data_ptr() % ALIGNMENT:
        parameter.data = parameter.data.clone()


def forget_gathered(parameter: nn.Parameter) -> None:
    """Drop gathered copies of a parameter whose shard is about to change."""
    if _is_gathered(parameter):
        # A small parameter that ZeRO keeps gathered would go on serving the old value.
        parameter.partition()  # type: ignore[attr-defined]
    # Last: partitioning makes the node's copy (hpZ) anew, from the old value.
    parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]


def _is_gathered(parameter: nn.Parameter) -> bool:
    return bool(parameter.ds_status.name == "AVAILABLE")  # type: ignore[attr-defined]
