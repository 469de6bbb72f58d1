"""This rank's part of every trained parameter, in the storage of ZeRO's optimiser.

ZeRO splits what the optimiser keeps over the ranks. Which elements are whose depends on the stage:

- `partitioned.Partitioned`, stage 3: a slice of every parameter; the weights that networks compute
  with are split in the same way.
- `flat.Flat`, stages 1 and 2: parameters stand one after the other in a few flat tensors, of which
  each rank owns an equal part; the weights that networks compute with are whole on every rank.

Everything else in the engine sees `Shards`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from m3i_scale.engine.checkpoint import Extent
from m3i_scale.objective.collectives import rank_and_size

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's

# Bytes at whose multiples weights begin: kernels of cuDNN, cuBLAS and PyTorch read so many at once,
# and the first two refuse, or find no algorithm for, what begins elsewhere.
ALIGNMENT = 16


def trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that the optimiser updates."""
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def joined(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """One flat copy (n,) on a device of tensors of one dtype."""
    whole = torch.empty(sum(map(torch.numel, parts)), dtype=parts[0].dtype, device=device)
    for piece, part in zip(whole.split([part.numel() for part in parts]), parts, strict=True):
        piece.copy_(part.flatten())
    return whole


class Shards(ABC):
    """Views of this rank's part: master weights (fp32), moments; and what follows from them.

    Args:
        optimizer: ZeRO's, as `deepspeed.initialize` returns it.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.rank, self.size = rank_and_size()

    # ----------------------------------------------------------------------------- of one parameter

    @abstractmethod
    def extent(self, parameter: nn.Parameter) -> Extent:
        """The elements of the flattened parameter that this rank owns."""

    @abstractmethod
    def place(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Where they begin: index of the master tensor, and offset in it."""

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """Master weights (n,): a view of the optimiser's storage, on the device where it lives.

        DeepSpeed's `safe_get_local_fp32_param` gives a copy of what is offloaded; written to, it
        would change nothing.
        """
        return self._view(parameter, lambda master: master)

    def moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        """One of `moments` (n,): a view of the optimiser's storage."""
        states = self.optimizer.optimizer.state
        return self._view(parameter, lambda master: states[master][moment])

    def _view(self, parameter: nn.Parameter, storage: Callable[[Tensor], Tensor]) -> Tensor:
        index, offset = self.place(parameter)
        own = self.extent(parameter)
        return storage(self.masters[index]).narrow(0, offset, own.stop - own.start)

    @abstractmethod
    def clamp(self, parameter: nn.Parameter, maximum: float) -> None:
        """Bound a trained parameter from above, in master and compute weights."""

    # ---------------------------------------------------------------------------------- of all

    @property
    def moments(self) -> tuple[str, ...]:
        """What the optimiser averages, by its names in checkpoints: Adam's, or LARS's."""
        own: tuple[str, ...] = getattr(self.optimizer.optimizer, "MOMENTS", MOMENTS)
        return own

    @property
    @abstractmethod
    def masters(self) -> list[Tensor]:
        """The flat tensors that the optimiser updates, padding included."""

    @abstractmethod
    def publish(self) -> None:
        """After the master weights were written: refresh the compute weights (a collective)."""

    @abstractmethod
    def flat_weights(self) -> tuple[list[Tensor], bool]:
        """Trained weights in compute precision, in few flat tensors; whether all ranks have all."""

    @abstractmethod
    def reduced_gradients(self, device: torch.device) -> list[Tensor]:
        """After a step's last backward pass: a copy of each of `masters`' gradient, on `device`."""

    @abstractmethod
    def drop_gradients(self, model: nn.Module) -> None:
        """Begin a step anew: forget its gradients so far, and weights that are gathered."""

    @abstractmethod
    def even(self, parts: list[tuple[nn.Parameter, Tensor]]) -> list[Tensor]:
        """From what ranks own to what they write: the slices `checkpoint.extent` (a collective).

        Args:
            parts: parameters, the same on all ranks, and views (n,) of what this rank owns of them.
        """

    def create_state(self) -> None:
        """Give the inner optimiser the state it would make at its first step.

        So that memory is known from the start, and saving and loading know one case only.
        """
        inner = self.optimizer.optimizer
        fused = any(group.get("fused") for group in inner.param_groups)
        for flat in self.masters:
            step: Tensor | int = torch.zeros((), device=flat.device if fused else "cpu")
            if not isinstance(inner, torch.optim.AdamW):  # the others count in an int
                step = 0
            inner.state[flat] = {"step": step} | {
                m: torch.zeros_like(flat, requires_grad=False) for m in self.moments
            }

    @property
    def adam_step(self) -> int:
        """Number of updates the optimiser has made."""
        states = self.optimizer.optimizer.state.values()
        return int(next(iter(states))["step"])

    @adam_step.setter
    def adam_step(self, step: int) -> None:
        for state in self.optimizer.optimizer.state.values():
            if isinstance(state["step"], Tensor):
                state["step"].fill_(step)
            else:
                state["step"] = step

    # ---------------------------------------------------------------------------- what memory holds

    @abstractmethod
    def compute_weights(self, model: nn.Module) -> Iterable[Tensor]:
        """Trained weights in compute precision, as this rank keeps them."""

    @abstractmethod
    def frozen_weights(self, model: nn.Module) -> Iterable[Tensor]:
        """The same of weights without gradient."""

    @abstractmethod
    def gathered_weights(self, model: nn.Module) -> Iterable[Tensor]:
        """Whole weights beside the kept ones."""

    @abstractmethod
    def gradients(self) -> Iterable[Tensor]:
        """Gradients that stay between steps."""

    @abstractmethod
    def buckets(self) -> Iterable[Tensor]:
        """Buffers of gradients being reduced that stay between steps."""


def needed(owner: object, *names: str) -> None:
    """Require attributes of DeepSpeed's objects that the engine reads.

    Raises:
        RuntimeError: they are not there.
    """
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        kind = owner if isinstance(owner, type) else type(owner)
        raise RuntimeError(
            f"the installed DeepSpeed has no {kind.__name__}.{missing[0]}, which the engine "
            "reads; install a version that pyproject.toml allows"
        )
