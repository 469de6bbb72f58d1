"""Shards at ZeRO stages 1 and 2: equal parts of flat tensors.

DeepSpeed puts the parameters of a group one after the other into one flat tensor in compute
precision, of which the networks' weights are views. Rank r owns the r-th of its W equal parts, with
master weights and Adam moments: some parameters as a whole, others from or up to some element, most
not at all. Checkpoints hold the slices of stage 3 whatever the stage; `Flat.even` sends what it
takes from those who own it to those who write it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import stage_1_and_2
from torch import Tensor, nn

from m3i_scale.engine.checkpoint import Extent, extent
from m3i_scale.engine.shards import Shards, joined, needed


class Piece(NamedTuple):
    """Elements of one flattened parameter that one rank owns and one rank writes."""

    parameter: int
    owner: int
    writer: int
    own: Extent


class Flat(Shards):
    """Parameters of stages 1 and 2."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        needed(
            optimizer, "bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups",
            "update_lp_params", "ipg_buckets", "averaged_gradients", "all_grad_tensors",
        )  # fmt: skip
        self._groups = {
            id(p): index for index, group in enumerate(optimizer.bit16_groups) for p in group
        }

    @property
    def masters(self) -> list[Tensor]:
        """One of each parameter group."""
        return list(self.optimizer.single_partition_of_fp32_groups)

    def whole(self, group: int) -> Tensor:
        """The compute weights of a parameter group, all ranks' parts (W * n,)."""
        flat: Tensor = self.optimizer.bit16_groups_flat[group]
        return flat

    def group(self, parameter: nn.Parameter) -> int:
        """Index of the parameter's group."""
        return self._groups[id(parameter)]

    def offset(self, parameter: nn.Parameter) -> int:
        """Where the parameter begins in the flat tensor of its group."""
        first = int(self.whole(self.group(parameter)).storage_offset())
        return int(parameter.data.storage_offset()) - first

    def extent(self, parameter: nn.Parameter) -> Extent:
        """What this rank owns; empty for most parameters."""
        return self._owned(parameter, self.rank)

    def _owned(self, parameter: nn.Parameter, rank: int) -> Extent:
        share = self.masters[self.group(parameter)].numel()
        offset, elements = self.offset(parameter), parameter.numel()
        start = min(max(rank * share - offset, 0), elements)
        return Extent(start, min(max((rank + 1) * share - offset, 0), elements))

    def place(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Index of the group, and offset in this rank's part of its flat tensor."""
        group, own = self.group(parameter), self.extent(parameter)
        if own.start == own.stop:
            return group, 0
        share = self.masters[group].numel()
        return group, self.offset(parameter) + own.start - self.rank * share

    @torch.no_grad()
    def publish(self) -> None:
        """Round this rank's part and gather those of all ranks."""
        self.optimizer.update_lp_params()

    @torch.no_grad()
    def clamp(self, parameter: nn.Parameter, maximum: float) -> None:
        """Every rank has the whole weight."""
        self.weight(parameter).clamp_(max=maximum)
        parameter.clamp_(max=maximum)

    def flat_weights(self) -> tuple[list[Tensor], bool]:
        """One of each parameter group, whole."""
        return list(self.optimizer.bit16_groups_flat), True

    def reduced_gradients(self, device: torch.device) -> list[Tensor]:
        """Of this rank's parts."""
        found = []
        for number in range(len(self.masters)):
            group = self.optimizer.averaged_gradients[number]
            flat = getattr(group, "flat_partition", None)
            parts = group if flat is None else [flat]
            found.append(joined(parts, device))
        return found

    def drop_gradients(self, model: nn.Module) -> None:
        """As DeepSpeed does where it skips a step."""
        zero = self.optimizer
        zero.zero_grad(set_to_none=True)
        for number in range(len(self.masters)):
            zero.averaged_gradients[number] = zero.all_grad_tensors[number] = None
        zero.micro_step_id = stage_1_and_2.INITIAL_MICRO_STEP_ID

    @torch.no_grad()
    def even(self, parts: list[tuple[nn.Parameter, Tensor]]) -> list[Tensor]:
        """Send every rank the elements that it writes; one collective."""
        if self.size == 1:
            return [part for _, part in parts]
        starts = [self.extent(p).start for p, _ in parts]
        pieces = list(self._pieces([p for p, _ in parts]))
        sent = sorted((x for x in pieces if x.owner == self.rank), key=lambda x: x.writer)
        cut = []
        for number, _, _, (start, stop) in sent:
            cut.append(parts[number][1][start - starts[number] : stop - starts[number]])
        received = sorted((x for x in pieces if x.writer == self.rank), key=lambda x: x.owner)
        lengths = [x.own.stop - x.own.start for x in received]
        empty = parts[0][1].new_empty(0)
        buffer = empty.new_empty(sum(lengths))
        dist.all_to_all_single(
            buffer,
            torch.cat([empty, *cut]),
            self._sizes(received, lambda x: x.owner),
            self._sizes(sent, lambda x: x.writer),
        )
        found: list[list[Tensor]] = [[empty] for _ in parts]
        for piece, part in zip(received, buffer.split(lengths), strict=True):
            found[piece.parameter].append(part)
        return [torch.cat(one) for one in found]

    def _sizes(self, pieces: list[Piece], other: Any) -> list[int]:
        """Elements that go to or come from each rank."""
        counts = [0] * self.size
        for piece in pieces:
            counts[other(piece)] += piece.own.stop - piece.own.start
        return counts

    def _pieces(self, parameters: list[nn.Parameter]) -> Iterator[Piece]:
        """Of every parameter in turn, from its first element to its last."""
        for number, parameter in enumerate(parameters):
            elements = parameter.numel()
            share = self.masters[self.group(parameter)].numel()
            first = self.offset(parameter) // share
            last = (self.offset(parameter) + elements - 1) // share
            slice_size = -(-elements // self.size)
            for owner in range(first, last + 1):
                have = self._owned(parameter, owner)
                for writer in range(have.start // slice_size, (have.stop - 1) // slice_size + 1):
                    want = extent(elements, writer, self.size)
                    own = Extent(max(have.start, want.start), min(have.stop, want.stop))
                    yield Piece(number, owner, writer, own)

    def compute_weights(self, model: nn.Module) -> list[Tensor]:
        """All of them, whole."""
        return list(self.optimizer.bit16_groups_flat)

    def frozen_weights(self, model: nn.Module) -> Iterator[Tensor]:
        """All of them, whole."""
        return (p.data for p in model.parameters() if not p.requires_grad)

    def gathered_weights(self, model: nn.Module) -> list[Tensor]:
        """None: the compute weights are whole."""
        return []

    def gradients(self) -> list[Tensor]:
        """None, after a step."""
        return [master.grad for master in self.masters if master.grad is not None]

    def buckets(self) -> list[Tensor]:
        """None, after a step."""
        buckets = self.optimizer.ipg_buckets.values()
        return [buffer for bucket in buckets for buffer in bucket.buffer]
