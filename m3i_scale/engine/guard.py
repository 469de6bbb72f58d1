"""What must not change between two updates, watched in every step.

Master weights, moments, averages, and the weights that networks compute with change at the end of a
step only. Their checksums after one update must be those before the next: what differs was changed
by a memory that lost a bit, or by a program that wrote where it must not. Where all ranks hold the
same weights, the checksums of all ranks must be the same, too: else a collective has given some
rank another result. The comparison stays on the device and is read with the figures of the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from m3i_scale.engine.checksums import quick
from m3i_scale.engine.momentum import Teacher
from m3i_scale.engine.shards import Shards

BUFFERS = "buffers"
_MASK = (1 << 52) - 1  # what a float64 holds exactly


def watched(
    shards: Shards, teacher: Teacher | None, device: torch.device
) -> tuple[dict[str, list[Tensor]], set[str]]:
    """Flat tensors by kind, and those kinds that are the same on all ranks."""
    masters = shards.masters
    states = shards.optimizer.optimizer.state
    kinds = {"master weights": masters}
    for moment in shards.moments:
        kinds[moment] = [states[master][moment] for master in masters]
    own = {tensor.data_ptr() for tensor in masters}
    weights, whole = shards.flat_weights()
    kinds["weights"] = [w for w in weights if w.data_ptr() not in own]
    replicas = {"weights"} if whole else set()
    if teacher is not None:
        kinds["averages"] = [teacher.flat]
        kinds["teacher's weights"] = teacher.whole
        replicas.add("teacher's weights")
    # What is offloaded would be read at the speed of the host.
    found = {kind: tensors for kind, tensors in kinds.items() if tensors and _on(device, tensors)}
    return found, replicas & found.keys()


class Guard:
    """Checksums of one rank's state.

    Args:
        shards: this rank's part.
        teacher: the averages, if there are any.
        model: the networks.
        device: where the figures of a step are.
    """

    def __init__(
        self, shards: Shards, teacher: Teacher | None, model: nn.Module, device: torch.device
    ) -> None:
        self._kinds, self._replicas = watched(shards, teacher, device)
        self._model, self._device = model, device
        self._flags = torch.zeros((), dtype=torch.int64, device=device)
        # On the device from here on, so that no step copies them there.
        self._bits = 1 << torch.arange(len(self._kinds), device=device)
        self._alike = torch.tensor([int(kind in self._replicas) for kind in self._kinds])
        self._alike = self._alike.to(device)
        self.checks = 0
        self.store()

    @property
    def names(self) -> list[str]:
        """Kinds, in the order of the bits of `report`'s first number."""
        return [*self._kinds, BUFFERS]

    def store(self) -> None:
        """After an update, or after the state was loaded: this is right."""
        self._stored = self._sums()
        self._buffers = self._buffer_sum()

    def check(self) -> None:
        """Before an update: what differs from what was stored is remembered."""
        self.checks += 1
        self._flags |= ((self._sums() != self._stored) * self._bits).sum()

    def check_buffers(self) -> None:
        """Before the networks run, which change them."""
        changed = (self._buffer_sum() != self._buffers).long()
        self._flags |= changed << len(self._kinds)

    def report(self) -> list[Tensor]:
        """Which kinds have changed, as bits; and a checksum of what all ranks have alike."""
        alike = (self._stored * self._alike).sum() & _MASK
        return [self._flags.double(), alike.double()]

    def verdict(self, reports: Tensor) -> dict[int, list[str]]:
        """Rank -> what is wrong there.

        Args:
            reports: of all ranks, float64 (ranks, 2) on the CPU.
        """
        found: dict[int, list[str]] = {}
        flags, alike = reports[:, 0].long().tolist(), reports[:, 1].tolist()
        for rank, bits in enumerate(flags):
            kinds = [name for n, name in enumerate(self.names) if bits >> n & 1]
            if kinds:
                found[rank] = [f"{' and '.join(kinds)} changed between two updates"]
        usual = Counter(alike).most_common(1)[0]
        for rank, own in enumerate(alike):
            if own != usual[0]:
                what = " and ".join(sorted(self._replicas))
                doubt = " (or there: only two ranks)" if len(alike) == 2 else ""
                other = alike.index(usual[0])
                found.setdefault(rank, []).append(
                    f"{what} differ from those of rank {other}{doubt}: a collective gave "
                    "another result"
                )
        return found

    def forget(self) -> None:
        """Forget what was found, when the state is replaced."""
        self._flags.zero_()
        self.store()

    def _sums(self) -> Tensor:
        none = torch.zeros(0, dtype=torch.int64, device=self._device)  # all is offloaded
        sums = [_sum(tensors, self._device).view(1) for tensors in self._kinds.values()]
        return torch.cat([none, *sums])

    def _buffer_sum(self) -> Tensor:
        buffers = [b for _, b in self._model.named_buffers() if b.numel()]
        return _sum(buffers, self._device)


def _on(device: torch.device, tensors: Sequence[Tensor]) -> bool:
    return all(tensor.device.type == device.type for tensor in tensors)


def _sum(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    sums = [quick(tensor).to(device) for tensor in tensors]
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.int64, device=device)
