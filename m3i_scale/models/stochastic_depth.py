"""Stochastic depth (arXiv 1603.09382) whose decisions are functions of the sample.

Which residual branches a row skips is a hash of the row's key and the number of the branch, and no
generator's next number: the same row skips the same branches however rows are spread over ranks and
micro-batches, in every pass over it and when a checkpointed block runs again. The hash is computed
on the device, once for all branches of a network.
"""

import torch
from torch import Tensor, nn


def _signed(number: int) -> int:
    """The int64 that has the lowest 64 bits of a number."""
    return (number + 2**63) % 2**64 - 2**63


_INCREMENT = _signed(0x9E3779B97F4A7C15)  # SplitMix64's constants
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)
_BITS = 24  # of a drawn number: what float32 holds exactly


def hash_keys(keys: Tensor, counter: Tensor | int) -> Tensor:
    """Number `counter` of the SplitMix64 sequence of each key: int64, shapes are broadcast.

    Products wrap around at 64 bits, as the generator wants them.
    """
    step = (counter + 1) * _INCREMENT
    x = keys + (_signed(step) if isinstance(step, int) else step)
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift to the right, filled up with zeros and not with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def draw_uniform(rows: int, branches: int, keys: Tensor | None, device: torch.device) -> Tensor:
    """Numbers from 0 to below 1 for every branch and row: float32 (branches, rows).

    `keys` are int64 (rows,), from which they are computed; without, the default generator draws.
    """
    if keys is None:
        return torch.rand(branches, rows, device=device)
    counter = torch.arange(branches, device=keys.device)[:, None]
    return _shifted(hash_keys(keys, counter), 64 - _BITS).float() * 2.0**-_BITS


class DropPath(nn.Module):
    """Drops a residual branch for whole rows, and scales it for the others by 1 / (1 - rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.drop_prob = rate

    def forward(self, branch: Tensor, drawn: Tensor | None) -> Tensor:
        """Apply to a branch (B, ...); `drawn` (B,) decides for each row, None: all are kept."""
        if drawn is None or not self.drop_prob:
            return branch
        factor = (drawn >= self.drop_prob).to(branch.dtype) / (1 - self.drop_prob)
        return branch * factor.view(-1, *[1] * (branch.dim() - 1))


def drop_path_rates(rate: float, depth: int, schedule: str) -> list[float]:
    """Stochastic depth of each of `depth` blocks: `uniform`, or `linear` from 0 to `rate`."""
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path_rate={rate}: must be at least 0 and below 1")
    if schedule == "uniform":
        return [rate] * depth
    if schedule == "linear":
        return [rate * i / max(depth - 1, 1) for i in range(depth)]
    raise ValueError(f"drop_path_type={schedule!r}: must be 'linear' or 'uniform'")
