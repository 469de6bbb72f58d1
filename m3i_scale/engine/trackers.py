"""Where else the figures of a run go: TensorBoard, W&B, trackio, MLflow, a CSV file.

Each tracker works in a thread of its own, so that a slow network, a hanging server or an exception
of its library never holds or ends training: what fails is named once, switched off and counted.
`metrics.jsonl` has every figure whatever happens here.

A run that is resumed goes on in the same run of the tracker: its name there ends with the identity
of the lineage (`lineage.Lineage.run`). Nothing here needs PyTorch, but TensorBoard's writer.
"""

from __future__ import annotations

import importlib.util
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from m3i_scale.config import ConfigError
from m3i_scale.engine.tracker_backends import BACKENDS, Backend, Opening, Rows

log = logging.getLogger(__name__)

# Module that a tracker imports, and what to install for it.
PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "'m3i-scale[wandb]'"),
    "trackio": ("trackio", "'m3i-scale[trackio]'"),
    "mlflow": ("mlflow", "'m3i-scale[mlflow]'"),
}
WAITING = 1000  # calls that may wait for a tracker; further ones are left out
CLOSING = 60.0  # seconds that a tracker has to write what waits, at the end


def missing_packages(names: Sequence[str]) -> dict[str, str]:
    """The trackers whose package is not installed, and what to give `pip install`."""
    packages = {name: PACKAGES[name] for name in names if name in PACKAGES}
    return {n: p for n, (module, p) in packages.items() if importlib.util.find_spec(module) is None}


def require_packages(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        ConfigError: the message says how to install it.
    """
    missing = missing_packages(names)
    if missing:
        raise ConfigError(
            f"logging.trackers has {' and '.join(missing)}, whose package is not installed: "
            f"pip install {' '.join(missing.values())}, or change logging.trackers"
        )


class Trackers:
    """All trackers of a run; no call here waits or raises.

    Args:
        names: `logging.trackers`.
        opening: the run.
    """

    def __init__(self, names: Sequence[str], opening: Opening) -> None:
        self._workers = [_Worker(name, opening) for name in names]

    @property
    def switched_off(self) -> int:
        """How many have failed."""
        return sum(worker.failed for worker in self._workers)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record the figures of a step."""
        self._tell(lambda backend: backend.scalars(step, dict(values)))

    def picture(self, step: int, name: str, path: Path) -> None:
        """Record a PNG file."""
        self._tell(lambda backend: backend.picture(step, name, path))

    def table(self, step: int, name: str, rows: Rows) -> None:
        """Record a table."""
        self._tell(lambda backend: backend.table(step, name, rows))

    def _tell(self, call: Callable[[Backend], None]) -> None:
        for worker in self._workers:
            worker.put(call)

    def close(self, seconds: float = CLOSING) -> None:
        """Let all write what waits, for so many seconds at most."""
        for worker in self._workers:
            worker.finish()
        for worker in self._workers:
            worker.join(seconds)


class _Worker:
    """The thread of one tracker."""

    def __init__(self, name: str, opening: Opening) -> None:
        self.failed = False
        self._name = name
        self._opening = opening
        self._calls: queue.Queue[Callable[[Backend], None]] = queue.Queue(WAITING)
        self._last = threading.Event()
        self._left_out = 0
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, call: Callable[[Backend], None]) -> None:
        if self.failed:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            if not self._left_out:
                log.error("tracker %s does not keep up; figures are left out there", self._name)
            self._left_out += 1

    def finish(self) -> None:
        self._last.set()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.error("tracker %s has not ended after %g s and is left behind", self._name, seconds)
        elif self._left_out:
            log.error("tracker %s lacks %d entries", self._name, self._left_out)

    def _work(self) -> None:
        try:
            backend = BACKENDS[self._name](self._opening)
            while True:
                try:
                    call = self._calls.get(timeout=0.2)
                except queue.Empty:
                    if self._last.is_set():
                        break
                    continue
                call(backend)
            backend.close()
        except Exception as error:  # whatever a tracker's library may raise
            self.failed = True
            words = " ".join(f"{type(error).__name__}: {error}".split())
            log.error("tracker %s is switched off, training goes on: %s", self._name, words)
