"""The teacher of the sharded student: its averages, and its weights.

The averages `theta' <- m theta' + (1 - m) theta` are kept in fp32, because with m close to one
nearly every update of a bf16 average would round to nothing. Each rank holds those of its own
slices and moves them without communication. The weights that the forward pass uses are these
averages in compute precision, either whole on every rank (`WholeTeacher`) or partitioned like the
student (`ShardedTeacher`); the values are the same, and so are the checkpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m3i_scale.engine import shards
from m3i_scale.objective.collectives import gather_rows


class Teacher(ABC):
    """Averages of the student's shards; `publish` writes them into the teacher's weights.

    Args:
        optimizer: ZeRO's; its master shards are read (fp32, or bf16 where DeepSpeed was told to
            keep them so).
        student: the trained networks, partitioned.
        teacher: the frozen copy, same names.
        device: where the averages live.

    Attributes:
        averages: fp32 shards by the student's names, of what is trained; what is frozen stays
            equal.
        teacher: the module whose weights `publish` writes.
    """

    def __init__(
        self, optimizer: object, student: nn.Module, teacher: nn.Module, device: torch.device
    ) -> None:
        self.teacher = teacher
        # The optimiser's own storage: views stay right for as long as it lives.
        views = {n: shards.local_weight(optimizer, p) for n, p in shards.trained(student)}
        self._students = list(views.values())
        # One buffer, in the order of the views.
        self._flat = torch.cat([view.detach().to(device, torch.float32) for view in self._students])
        parts = self._flat.split([view.numel() for view in self._students])
        self.averages = dict(zip(views, parts, strict=True))

    @torch.no_grad()
    def update(self, coefficient: float) -> None:
        """Apply the rule with `m = coefficient`; call it after every real optimiser step."""
        # Copies of what is offloaded or not in fp32, the views themselves otherwise.
        place = self._flat.device
        students = [s.to(place, torch.float32, non_blocking=True) for s in self._students]
        torch._foreach_lerp_(list(self.averages.values()), students, 1 - coefficient)
        self.publish()

    @abstractmethod
    def publish(self) -> None:
        """Write the averages into the teacher's weights."""


class ShardedTeacher(Teacher):
    """The teacher is partitioned by ZeRO-3, and gathered block by block when it runs."""

    def __init__(
        self, optimizer: object, student: nn.Module, teacher: nn.Module, device: torch.device
    ) -> None:
        super().__init__(optimizer, student, teacher, device)
        weights = dict(teacher.named_parameters())
        self._weights = [weights[name] for name in self.averages]

    @torch.no_grad()
    def publish(self) -> None:
        """Write the averages into this rank's slices; nothing is sent."""
        for weight in self._weights:
            shards.forget_gathered(weight)
        torch._foreach_copy_([shards.shard(w) for w in self._weights], list(self.averages.values()))
        if self._flat.is_cuda:
            # ZeRO gathers on a stream of its own, which does not wait for this one.
            torch.cuda.current_stream().synchronize()


class WholeTeacher(Teacher):
    """The teacher is whole on every rank, outside of ZeRO; one all-gather renews its weights.

    `teacher` must not be a part of the module that DeepSpeed drives. Its parameters, partitioned by
    `zero.Init` and equal to the student's, become views of one buffer.
    """

    def __init__(
        self, optimizer: object, student: nn.Module, teacher: nn.Module, device: torch.device
    ) -> None:
        super().__init__(optimizer, student, teacher, device)
        trained = set(self.averages)
        names = [n for n, _ in teacher.named_parameters()]
        # Those that move first, in the order of the averages.
        order = [*self.averages, *(n for n in names if n not in trained)]
        weights = dict(teacher.named_parameters())
        own = [shards.shard(weights[name]).to(device) for name in order]
        self._tables = _whole_tables(own)
        _fill_tables(self._tables, torch.cat(own))
        for name, table in zip(order, self._tables, strict=True):
            replace_parameter(teacher, name, shards.cut(table, weights[name]))
        del self._tables[len(trained) :]
        for module in teacher.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)

    @torch.no_grad()
    def publish(self) -> None:
        """Round the averages, gather those of all ranks (a collective), put tensors together."""
        _fill_tables(self._tables, self._flat.to(self._tables[0].dtype))


def _whole_tables(own: list[Tensor]) -> list[Tensor]:
    """Of shards (k,), room for those of all ranks, (W, k) each, aligned in one buffer."""
    size = dist.get_world_size()
    step = shards.ALIGNMENT // own[0].element_size()
    counts = [size * part.numel() for part in own]
    rooms = [-(-count // step) * step for count in counts]
    parts = own[0].new_empty(sum(rooms)).split(rooms)
    return [part[:n].view(size, -1) for part, n in zip(parts, counts, strict=True)]


def _fill_tables(tables: list[Tensor], own: Tensor) -> None:
    """Gather every rank's shards, which stand one after the other in `own`, into tables (W, k)."""
    rows = gather_rows(own)  # (W, sum of k)
    torch._foreach_copy_(tables, list(rows.split([table.shape[1] for table in tables], 1)))


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a plain, frozen parameter in the place of another one."""
    path, _, last = name.rpartition(".")
    module.get_submodule(path).register_parameter(last, nn.Parameter(value, requires_grad=False))


def start_equal(student: nn.Module, teacher: nn.Module) -> None:
    """Copy the student into the teacher, before the optimiser exists."""
    students = dict(student.named_parameters())
    for name, parameter in teacher.named_parameters():
        shards.copy_shard(students[name], parameter)
