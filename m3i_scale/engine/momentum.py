"""The teacher of the sharded student: its averages, and its weights.

The averages `theta' <- m theta' + (1 - m) theta` are kept in fp32, because with m close to one
nearly every update of a bf16 average would round to nothing. Each rank holds those of what it owns
of the student and moves them without communication. The weights that the forward pass uses are
these averages in compute precision: at ZeRO stage 3 either whole on every rank (`WholeTeacher`) or
partitioned like the student (`ShardedTeacher`), at stages 1 and 2 whole (`FlatTeacher`). The values
are the same, and so are the checkpoints. Where there is no teacher, `WeightAverages` are the moving
average of all weights, for evaluation.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m3i_scale.engine import partitioned
from m3i_scale.engine.flat import Flat
from m3i_scale.engine.partitioned import Partitioned
from m3i_scale.engine.shards import ALIGNMENT, Shards, trained
from m3i_scale.objective.collectives import gather_rows, gather_rows_into


class Teacher(ABC):
    """Averages of this rank's part of the student; `publish` writes them into the weights.

    Args:
        teacher: the frozen copy of the student, same names.
        students: master weights of this rank's part: views of the optimiser's own storage, right
            for as long as it lives (fp32, or bf16 where DeepSpeed was told to keep them so).
        device: where the averages live.

    Attributes:
        averages: fp32, by the student's names, of what is trained; what is frozen stays equal.
        teacher: the module whose weights `publish` writes; None: there is none.
        prefix: what the student's names begin with in the networks.
    """

    averages: dict[str, Tensor]
    prefix = "student."

    def __init__(
        self, teacher: nn.Module | None, students: list[Tensor], device: torch.device
    ) -> None:
        self.teacher = teacher
        self._students = students
        # One buffer, in the order of the views.
        self._flat = torch.cat([view.detach().to(device, torch.float32) for view in students])
        self._parts = list(self._flat.split([view.numel() for view in students]))

    @property
    def flat(self) -> Tensor:
        """All averages, one after the other, with padding."""
        return self._flat

    @property
    def whole(self) -> list[Tensor]:
        """Weights that follow the averages and are whole on every rank, in few tensors."""
        return []

    @torch.no_grad()
    def update(self, coefficient: float) -> None:
        """Apply the rule with `m = coefficient`; call it after every real optimiser step."""
        # Copies of what is offloaded or not in fp32, the views themselves otherwise.
        place = self._flat.device
        students = [s.to(place, torch.float32, non_blocking=True) for s in self._students]
        torch._foreach_lerp_(self._parts, students, 1 - coefficient)
        self.publish()

    @abstractmethod
    def publish(self) -> None:
        """Write the averages into the teacher's weights."""


class _OfSlices(Teacher):
    """Stage 3: an average for every slice, with its padding."""

    def __init__(
        self, shards: Partitioned, student: nn.Module, teacher: nn.Module, device: torch.device
    ) -> None:
        parameters = dict(trained(student))
        super().__init__(teacher, [shards.padded_weight(p) for p in parameters.values()], device)
        lengths = (own.stop - own.start for own in map(shards.extent, parameters.values()))
        self.averages = {
            name: part[:length]
            for name, part, length in zip(parameters, self._parts, lengths, strict=True)
        }


class ShardedTeacher(_OfSlices):
    """The teacher is partitioned by ZeRO-3, and gathered block by block when it runs."""

    def __init__(
        self, shards: Partitioned, student: nn.Module, teacher: nn.Module, device: torch.device
    ) -> None:
        super().__init__(shards, student, teacher, device)
        weights = dict(teacher.named_parameters())
        self._weights = [weights[name] for name in self.averages]

    @torch.no_grad()
    def publish(self) -> None:
        """Write the averages into this rank's slices; nothing is sent."""
        for weight in self._weights:
            partitioned.forget_gathered(weight)
        torch._foreach_copy_([partitioned.shard(w) for w in self._weights], self._parts)
        if self._flat.is_cuda:
            # ZeRO gathers on a stream of its own, which does not wait for this one.
            torch.cuda.current_stream().synchronize()


class WholeTeacher(_OfSlices):
    """The teacher is whole on every rank, outside of ZeRO; one all-gather renews its weights.

    `teacher` must not be a part of the module that DeepSpeed drives. Its parameters, partitioned by
    `zero.Init` and equal to the student's, become views of one buffer.
    """

    def __init__(
        self, shards: Partitioned, student: nn.Module, teacher: nn.Module, device: torch.device
    ) -> None:
        super().__init__(shards, student, teacher, device)
        moving = set(self.averages)
        names = [n for n, _ in teacher.named_parameters()]
        # Those that move first, in the order of the averages.
        order = [*self.averages, *(n for n in names if n not in moving)]
        weights = dict(teacher.named_parameters())
        own = [partitioned.shard(weights[name]).to(device) for name in order]
        self._buffer, self._tables = _whole_tables(own)
        _fill_tables(self._tables, torch.cat(own))
        for name, table in zip(order, self._tables, strict=True):
            replace_parameter(teacher, name, partitioned.cut(table, weights[name]))
        del self._tables[len(moving) :]
        _move_buffers(teacher, device)

    @property
    def whole(self) -> list[Tensor]:
        """The buffer of all of them."""
        return [self._buffer]

    @torch.no_grad()
    def publish(self) -> None:
        """Round the averages, gather those of all ranks (a collective), put tensors together."""
        _fill_tables(self._tables, self._flat.to(self._tables[0].dtype))


class FlatTeacher(Teacher):
    """Stages 1 and 2: the teacher is whole on every rank, in flat tensors as the student's are.

    The student must have parameter groups to itself (`zero.parameter_groups`): then this rank's
    part of their flat tensors is averaged as a whole, and an all-gather of the averages of each
    puts the teacher's weights where they are read.
    """

    def __init__(
        self, shards: Flat, student: nn.Module, teacher: nn.Module, device: torch.device
    ) -> None:
        parameters = dict(trained(student))
        groups = sorted({shards.group(p) for p in parameters.values()})
        super().__init__(teacher, [shards.masters[group] for group in groups], device)
        parts = dict(zip(groups, self._parts, strict=True))
        self._tables = {group: shards.whole(group).clone() for group in groups}
        self.averages = {}
        for name, parameter in parameters.items():
            own, (group, begin) = shards.extent(parameter), shards.place(parameter)
            self.averages[name] = parts[group].narrow(0, begin, own.stop - own.start)
            offset = shards.offset(parameter)
            weight = self._tables[group][offset : offset + parameter.numel()]
            replace_parameter(teacher, name, weight.view(parameter.shape))
        for name, weight in list(teacher.named_parameters()):
            if name not in parameters:
                replace_parameter(teacher, name, weight.data.to(device))
        _move_buffers(teacher, device)

    @property
    def whole(self) -> list[Tensor]:
        """One tensor of each parameter group."""
        return list(self._tables.values())

    @torch.no_grad()
    def publish(self) -> None:
        """Round the averages and gather those of all ranks (a collective for each group)."""
        tables = list(self._tables.values())
        rounded = self._flat.to(tables[0].dtype)
        own = rounded.split([part.numel() for part in self._parts])
        for table, part in zip(tables, own, strict=True):
            gather_rows_into(table, part)


class WeightAverages(Teacher):
    """Averages of all trained weights, at any stage, without a second network.

    Nothing reads them in training; inside `in_use` they are the weights.
    """

    prefix = ""

    def __init__(self, shards: Shards, model: nn.Module, device: torch.device) -> None:
        super().__init__(None, shards.masters, device)
        self._shards = shards
        self.averages = {}
        for name, parameter in trained(model):
            own, (part, begin) = shards.extent(parameter), shards.place(parameter)
            self.averages[name] = self._parts[part].narrow(0, begin, own.stop - own.start)

    def publish(self) -> None:
        """Nothing: no weights follow the averages."""

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the networks compute with the averages (collectives at both ends)."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for part, weights in zip(self._parts, self._shards.masters, strict=True):
            kept = weights.clone()
            weights.copy_(part)
            part.copy_(kept)
        self._shards.publish()


def _whole_tables(own: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Of shards (k,), room for those of all ranks: one buffer, and aligned tables (W, k) in it."""
    size = dist.get_world_size()
    step = ALIGNMENT // own[0].element_size()
    counts = [size * part.numel() for part in own]
    rooms = [-(-count // step) * step for count in counts]
    buffer = own[0].new_zeros(sum(rooms))  # between tables, too: all ranks' are compared
    parts = buffer.split(rooms)
    return buffer, [part[:n].view(size, -1) for part, n in zip(parts, counts, strict=True)]


def _fill_tables(tables: list[Tensor], own: Tensor) -> None:
    """Gather every rank's shards, which stand one after the other in `own`, into tables (W, k)."""
    rows = gather_rows(own)  # (W, sum of k)
    torch._foreach_copy_(tables, list(rows.split([table.shape[1] for table in tables], 1)))


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a plain, frozen parameter in the place of another one."""
    path, _, last = name.rpartition(".")
    module.get_submodule(path).register_parameter(last, nn.Parameter(value, requires_grad=False))


def _move_buffers(teacher: nn.Module, device: torch.device) -> None:
    for module in teacher.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


@torch.no_grad()
def start_equal(student: nn.Module, teacher: nn.Module) -> None:
    """Copy the student into the teacher, partitioned or not, before the optimiser exists."""
    students = dict(student.named_parameters())
    for name, parameter in teacher.named_parameters():
        source, target = (getattr(p, "ds_tensor", p).data for p in (students[name], parameter))
        target.copy_(source)
