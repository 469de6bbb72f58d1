"""A record of torch's collectives: where a rank is, how long it waits for others, what it sends.

`install` puts a thin layer around the functions of `torch.distributed`, which DeepSpeed and the
objective call. A call costs a few microseconds. From it follow

- the collective that a rank is in, for the watchdog;
- the time that a rank's device works between collectives: the rank for which all others wait works
  longest. On a GPU pairs of events on the computing stream measure the waits; they are read a step
  later, when they have long passed, so that nothing is waited for;
- while a `tape` runs, checksums of what each collective was given and gave (`verify`).
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from m3i_scale.engine.checksums import quick, tensors_in

# Names of what a function is given and gives: positions, and keywords.
_IN_PLACE = ((0, "tensor"), (0, "tensor"))
_FUNCTIONS: dict[str, tuple[tuple[int, str], tuple[int, str]]] = {
    "all_reduce": _IN_PLACE,
    "broadcast": _IN_PLACE,
    "reduce": _IN_PLACE,
    "all_gather": ((1, "tensor"), (0, "tensor_list")),
    "all_gather_into_tensor": ((1, "input_tensor"), (0, "output_tensor")),
    "all_gather_single": ((1, "input_tensor"), (0, "output_tensor")),
    "gather": ((0, "tensor"), (1, "gather_list")),
    "scatter": ((1, "scatter_list"), (0, "tensor")),
    "reduce_scatter": ((1, "input_list"), (0, "output")),
    "reduce_scatter_tensor": ((1, "input"), (0, "output")),
    "reduce_scatter_single": ((1, "input"), (0, "output")),
    "all_to_all": ((1, "input_tensor_list"), (0, "output_tensor_list")),
    "all_to_all_single": ((1, "input"), (0, "output")),
    "barrier": ((9, ""), (9, "")),
}
# DeepSpeed compares its plans with them, in some steps.
_NO_RESULTS = {"broadcast", "barrier"}


@dataclass
class Call:
    """One collective of this rank."""

    name: str
    number: int  # of this process
    size: str
    begun: float  # monotonic seconds
    passed: Any = None  # event after it, on a GPU

    def __str__(self) -> str:
        since = time.monotonic() - self.begun
        return f"{self.name} of {self.size}, number {self.number}, begun {since:.1f} s ago"


@dataclass
class Entry:
    """What a tape holds: a name, and the checksums of what was sent and received."""

    name: str
    sent: Tensor
    received: Tensor


@dataclass
class _Waits:
    """Of one step: its begin and end, and the waits in between; seconds, or events."""

    begin: Any
    end: Any = None
    pairs: list[tuple[Any, Any]] = field(default_factory=list)


class Recorder:
    """The record of this process."""

    def __init__(self) -> None:
        self.calls = 0
        self._open: list[Call] = []  # innermost last
        self._last: Call | None = None
        self._recent: deque[Call] = deque(maxlen=512)  # on a GPU: perhaps not yet passed
        self._tape: list[Entry] | None = None
        self._device: torch.device | None = None
        self._stream: Any = None
        self._now: _Waits | None = None
        self._before: _Waits | None = None

    # ------------------------------------------------------------------------------- where it is

    def where(self) -> str:
        """In words, for the watchdog: which collective this rank is in. Waits for nothing."""
        waiting = next((c for c in list(self._recent) if not c.passed.query()), None)
        calls, last = list(self._open), self._last
        if calls:
            return f"in {calls[-1]}"
        if waiting is not None:
            return f"the device has not passed {waiting}; the host goes on after {last}"
        if last is None:
            return "in no collective, and there was none before"
        return f"in no collective; the last one was {last}"

    # --------------------------------------------------------------------------------- how long

    def begin_step(self, device: torch.device) -> None:
        """A step begins: waits are measured from here."""
        self._device = device
        if device.type == "cuda":
            self._stream = torch.cuda.current_stream(device)
        self._now = _Waits(self._mark())

    def take(self) -> float:
        """Seconds that the device worked between collectives in a step.

        On a CPU, of the step that ends now; on a GPU, of the step before it. 0: not known.
        """
        waits, self._now = self._now, None
        if waits is None:
            return 0.0
        waits.end = self._mark()
        if self._stream is not None:
            waits, self._before = self._before, waits
        return _worked(waits) if waits is not None else 0.0

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """What happens inside is no work of the device between collectives."""
        if self._now is None or not self._on_main_stream():
            yield
            return
        begin = self._mark()
        try:
            yield
        finally:
            if self._now is not None:
                self._now.pairs.append((begin, self._mark()))

    def measures(self, stream: Any) -> bool:
        """Whether a wait of this stream is one of the computing stream, within a step."""
        return self._now is not None and self._stream is not None and stream == self._stream

    def _on_main_stream(self) -> bool:
        return self._stream is None or torch.cuda.current_stream(self._device) == self._stream

    def _mark(self) -> Any:
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    # --------------------------------------------------------------------------------- what is sent

    @contextlib.contextmanager
    def tape(self) -> Iterator[list[Entry]]:
        """Inside, checksums are recorded of all that is sent and received."""
        entries: list[Entry] = []
        self._tape = entries
        try:
            yield entries
        finally:
            self._tape = None

    @property
    def recording(self) -> bool:
        """Whether a tape runs."""
        return self._tape is not None

    def note(self, name: str, value: Tensor) -> None:
        """Put something that this rank has computed on the tape."""
        if self._tape is not None:
            found = quick(value)
            self._tape.append(Entry(name, found, found))

    # ------------------------------------------------------------------------------------ the layer

    def call(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a collective."""
        if self._open:  # one that is made of others
            return function(*args, **kwargs)
        given, gives = _FUNCTIONS[name]
        size = _size(_argument(given, args, kwargs))
        own = Call(name, self.calls, size, time.monotonic())
        self.calls += 1
        self._last = own
        self._open.append(own)
        sent = self._sum(given, args, kwargs)
        try:
            with self.apart():
                work = function(*args, **kwargs)
            received = self._sum(gives, args, kwargs) if work is None else None
        except Exception as error:
            _mark(error, own)
            raise
        finally:
            self._open.pop()
        if work is not None:  # it goes on by itself
            return _Work(self, own, work)
        self._remember(own)
        if self._tape is not None and sent is not None and received is not None:
            self._tape.append(Entry(name, sent, received))
        return None

    def wait(self, own: Call, work: Any, arguments: Any) -> Any:
        """Wait for a collective that goes on by itself."""
        self._open.append(own)
        try:
            with self.apart():
                return work.wait(*arguments)
        except Exception as error:
            _mark(error, own)
            raise
        finally:
            self._open.pop()
            self._remember(own)

    def _remember(self, own: Call) -> None:
        if self._stream is not None and self._on_main_stream():
            own.passed = self._now.pairs[-1][1] if self._now is not None else self._mark()
            self._recent.append(own)

    def _sum(self, place: tuple[int, str], args: Any, kwargs: Any) -> Tensor | None:
        if self._tape is None or self._open[-1].name in _NO_RESULTS:
            return None
        sums = [quick(t) for t in tensors_in(_argument(place, args, kwargs))]
        return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.int64)


def _mark(error: Exception, call: Call) -> None:
    # A rank that fails here has mostly lost another one and does not know why; `events` says so.
    error.broken_collective = str(call)  # type: ignore[attr-defined]


class _Work:
    """The handle of a collective under way; a wait for it counts as a wait for other ranks."""

    def __init__(self, recorder: Recorder, call: Call, work: Any) -> None:
        self._recorder, self._call, self._work = recorder, call, work

    def wait(self, *arguments: Any) -> Any:
        return self._recorder.wait(self._call, self._work, arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _worked(waits: _Waits) -> float:
    """Seconds of a step without its waits."""
    pairs = [(waits.begin, waits.end), *waits.pairs]
    if isinstance(waits.begin, float):
        whole, *apart = [end - begin for begin, end in pairs]
    else:
        whole, *apart = [begin.elapsed_time(end) / 1000 for begin, end in pairs]
    return max(0.0, whole - sum(apart))


def _argument(place: tuple[int, str], args: Any, kwargs: Any) -> Any:
    position, name = place
    return args[position] if position < len(args) else kwargs.get(name)


def _size(value: Any) -> str:
    tensors = list(tensors_in(value))
    if not tensors:
        return "nothing"
    count = sum(tensor.numel() for tensor in tensors)
    return f"{count:,} {str(tensors[0].dtype).removeprefix('torch.')}"


RECORDER = Recorder()


def install() -> None:
    """Put the layer around torch's functions, once."""
    for name in _FUNCTIONS:
        original = getattr(dist, name, None)
        if original is not None and not hasattr(original, "recorded"):
            layer = _layer(name, original)
            for module in (dist, distributed_c10d):
                setattr(module, name, layer)
    waits = getattr(torch.cuda.Stream, "wait_stream", None)
    if torch.cuda.is_available() and waits is not None and not hasattr(waits, "recorded"):
        torch.cuda.Stream.wait_stream = _waiting(waits)  # type: ignore[method-assign]


def _waiting(original: Callable[..., Any]) -> Callable[..., Any]:
    """DeepSpeed gathers and reduces on other streams, for which the computing one waits."""

    @functools.wraps(original)
    def recorded(self: Any, stream: Any) -> Any:
        if not RECORDER.measures(self):
            return original(self, stream)
        with RECORDER.apart():
            return original(self, stream)

    recorded.recorded = True  # type: ignore[attr-defined]
    return recorded


def _layer(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        return RECORDER.call(name, original, args, kwargs)

    recorded.recorded = True  # type: ignore[attr-defined]
    return recorded
