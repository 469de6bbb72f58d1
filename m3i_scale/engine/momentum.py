"""The teacher under ZeRO-3: partitioned like the student, updated shard by shard.

No communication: each rank moves its own slice. The averages are kept in fp32, because with m close
to one nearly every update of a bf16 average would round to nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m3i_scale.engine import shards


class ShardedTeacher:
    """`theta' <- m theta' + (1 - m) theta` on the local shards of two equal module trees.

    Args:
        student: the trained networks, partitioned; its master shards are read (fp32, or bf16 where
            DeepSpeed was told to keep them so).
        teacher: the frozen copy, same names; its compute-precision shards are written.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        students = dict(student.named_parameters())
        self._pairs = {
            name: (students[name], p)
            for name, p in teacher.named_parameters()
            if students[name].requires_grad  # what is frozen stays equal
        }
        self.averages: dict[str, Tensor] = {
            name: shards.local_weight(student).detach().to(torch.float32, copy=True)
            for name, (student, _) in self._pairs.items()
        }

    @torch.no_grad()
    def update(self, coefficient: float) -> None:
        """Apply the rule with `m = coefficient`; call it after every real optimiser step."""
        for name, (student, _) in self._pairs.items():
            self.averages[name].lerp_(shards.local_weight(student).float(), 1 - coefficient)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Write the averages into the teacher."""
        for name, (_, teacher) in self._pairs.items():
            shards.write_shard(teacher, self.averages[name])
        teachers = (teacher for _, teacher in self._pairs.values())
        if any(teacher.ds_tensor.is_cuda for teacher in teachers):  # type: ignore[attr-defined]
            # ZeRO gathers on a stream of its own, which does not wait for this one.
            torch.cuda.current_stream().synchronize()


def start_equal(student: nn.Module, teacher: nn.Module) -> None:
    """Copy the student into the teacher, before the optimiser exists."""
    students = dict(student.named_parameters())
    for name, parameter in teacher.named_parameters():
        shards.copy_shard(students[name], parameter)
