"""DeepSpeed's coalesced collectives at a host cost that does not grow with the number of ranks.

DeepSpeed (0.19) cuts every gradient into one slice per rank before a reduce-scatter, and puts every
gathered parameter together from one slice per rank: with P parameters on W ranks, P * W calls into
torch. At 160 ranks that is half of a training step's host time. Here the slices of a parameter are
the rows of one strided view, (W, k) with k = ceil(N / W), and a copy moves all of them. Layout on
the wire, arithmetic and results are DeepSpeed's, bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import deepspeed.comm
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import partition_parameters, stage3
from torch import Tensor

from m3i_scale.engine.communication import RECORDER
from m3i_scale.engine.partitioned import align

log = logging.getLogger(__name__)

_Handle: Any = partition_parameters.AllGatherCoalescedHandle
_Lone: Any = partition_parameters.NoGatherHandle
_LoneCoalesced: Any = partition_parameters.NoGatherCoalescedHandle
_AVAILABLE = partition_parameters.ZeroParamStatus.AVAILABLE


def install() -> None:
    """Let ZeRO-3 use the functions of this module (DeepSpeed has no registry for them)."""
    places = (
        (partition_parameters, "AllGatherCoalescedHandle", RowsHandle),
        (partition_parameters, "NoGatherHandle", LoneHandle),
        (partition_parameters, "NoGatherCoalescedHandle", LoneCoalescedHandle),
        (stage3, "reduce_scatter_coalesced", reduce_scatter_coalesced),
    )
    for module, name, replacement in places:
        if not hasattr(module, name):
            log.warning(
                "this DeepSpeed has no %s.%s: its own collectives are used, whose host time grows "
                "with the number of GPUs",
                module.__name__,
                name,
            )
            continue
        setattr(module, name, replacement)


@torch.no_grad()
def reduce_scatter_coalesced(tensors: Sequence[Tensor], group: Any = None) -> list[Tensor]:
    """Average tensors over the ranks of a group; each rank gets its shard of each (a collective).

    Args:
        tensors: contiguous, of one dtype; the same shapes on every rank. May be overwritten.
        group: process group; None is the default one.

    Returns:
        Of each tensor, flattened, the elements `[rank * k, (rank + 1) * k)` that there are.
    """
    size, rank = deepspeed.comm.get_world_size(group), deepspeed.comm.get_rank(group)
    rows = [tensor.view(-1) for tensor in tensors]
    if size == 1:
        return rows
    widths = [-(-row.numel() // size) for row in rows]
    if len(rows) == 1 and rows[0].numel() == size * widths[0]:
        flat = rows[0]
    else:
        flat = rows[0].new_empty(size * sum(widths))
        if RECORDER.recording:  # what is left over between rows would count as sent
            flat.zero_()
        for row, table in zip(rows, flat.view(size, -1).split(widths, 1), strict=True):
            _fill(table, row)
    flat.div_(size)  # before the sum, as DeepSpeed does
    own = flat.view(size, -1)[rank]
    deepspeed.comm.reduce_scatter_fn(own, flat, group=group, async_op=False)
    return [
        part[: max(0, min(width, row.numel() - rank * width))]
        for row, width, part in zip(rows, widths, own.split(widths), strict=True)
    ]


def _fill(table: Tensor, row: Tensor) -> None:
    """Write a flat tensor (N,) into a table (W, k) row by row; what is left over stays as it is."""
    width = table.shape[1]
    full = row.numel() // width
    table[:full].copy_(row[: full * width].view(full, width))
    if row.numel() % width:
        table[full, : row.numel() - full * width].copy_(row[full * width :])


class RowsHandle(_Handle):
    """A coalesced all-gather under way; `wait` puts the parameters together."""

    complete: bool

    def wait(self, handle_dependency: bool = True) -> None:
        """Wait for the data, and give every parameter its whole tensor."""
        if self.complete:
            return
        if self.quantization:  # dequantised slice by slice
            super().wait(handle_dependency=handle_dependency)
            return
        self.allgather_handle.wait()
        first = self.partitions[0]  # of equal neighbours in one buffer
        table = first.as_strided((self.world_size, first.numel()), (first.numel(), 1))
        hops = [p.ds_secondary_tensor_num_of_groups for p in self.params]
        widths = [
            p.ds_tensor.ds_numel * (hop if self.use_secondary_tensor else 1)
            for p, hop in zip(self.params, hops, strict=True)
        ]
        for parameter, part in zip(self.params, table.split(widths, 1), strict=True):
            # Its own storage: a view, of one column say, would keep the whole buffer alive.
            whole = part.contiguous().view(-1)[: parameter.ds_numel]
            parameter.data = whole.view(parameter.ds_shape).to(parameter.ds_tensor.dtype)
            align(parameter)
            parameter.ds_status = _AVAILABLE
        self.complete = True
        if get_accelerator().is_synchronized_device():
            return
        if handle_dependency:
            table.record_stream(get_accelerator().current_stream())
        else:  # the caller waits, then empties this list
            _Handle.data_buffer.append(self.partitions)


class LoneHandle(_Lone):
    """A parameter of a single rank, which has all of it; nothing has to be waited for.

    DeepSpeed waits for the GPU here, at every module. What is offloaded is copied on the stream
    that gathers, for which the computing one waits by itself. The parameter is a view of the flat
    buffer of its group, unless it would begin at an odd place.
    """

    def __init__(self, parameter: Any) -> None:
        super().__init__(parameter)
        align(parameter)
        self._waiting = [parameter]

    def wait(self, **_: Any) -> None:
        """Mark the parameter as there, once: it may have been released since."""
        while self._waiting:
            self._waiting.pop().ds_status = _AVAILABLE


class LoneCoalescedHandle(_LoneCoalesced):
    """The same for several parameters."""

    def __init__(self, parameters: list[Any]) -> None:
        super().__init__(parameters)
        for parameter in parameters:
            align(parameter)
        self._waiting = list(parameters)

    def wait(self, **_: Any) -> None:
        """Mark the parameters as there, once."""
        while self._waiting:
            self._waiting.pop().ds_status = _AVAILABLE
