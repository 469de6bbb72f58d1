"""The queue of MoCo (arXiv 1911.05722): targets of earlier batches are further negatives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m3i_scale.objective.collectives import gather


class KeyQueue(nn.Module):
    """The last `size` keys of width D, equal on all ranks, in the precision of the networks.

    All ranks push the keys of all ranks in rank order, which is the order of the stream; the
    buffers are part of every checkpoint.
    """

    keys: Tensor  # (size, D), the newest batch first
    filled: Tensor  # int64 (): how many of them are keys

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(size, width))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @property
    def exists(self) -> Tensor:
        """Which rows are keys: bool (size,)."""
        return torch.arange(len(self.keys), device=self.keys.device) < self.filled

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Put in the keys (B, D) of every rank (a collective); the oldest leave."""
        self.put(gather(keys.detach()))

    @torch.no_grad()
    def put(self, new: Tensor) -> None:
        """Put in keys (R, D), the same on all ranks.

        A batch with a key that is not finite is left out whole: it would spoil every loss for as
        long as it stayed.
        """
        size, new = len(self.keys), new.to(self.keys.dtype)
        sound = torch.isfinite(new).all()
        # New tensors, no writes in place: the backward pass still needs the keys of the scores.
        self.keys = torch.where(sound, torch.cat([new, self.keys])[:size], self.keys)
        self.filled = torch.where(sound, (self.filled + len(new)).clamp(max=size), self.filled)
