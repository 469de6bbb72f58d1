"""Times the kernels of another checkout in a process beside this one, request by request.

Two versions of one package, which register operators of the same names, cannot live in one process.
The other process runs this folder's benchmark on the other checkout's `m3i_kernels`, so both are
timed by the same code on the same inputs; while one is timed, the other waits.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

_DTYPE = "torch."


class Base:
    """The other checkout's process; a context manager."""

    def __init__(self, folder: pathlib.Path) -> None:
        kernels = folder.resolve() / "kernels"
        path = os.pathsep.join((str(kernels), os.environ.get("PYTHONPATH", "")))
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Base":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def timer(
        self, operator: str, problem: Any, batch: int, name: str
    ) -> Callable[[str], list[float]]:
        """Return a function of the direction that times there: milliseconds, none if it failed."""
        request = {
            "operator": operator,
            "problem": problem.name,
            "dtype": str(problem.dtype).removeprefix(_DTYPE),
            "shape": problem.shape,
            "batch": batch,
            "name": name,
        }
        return functools.partial(self._ask, request)

    def _ask(self, request: dict[str, Any], direction: str) -> list[float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request | {"direction": direction}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "its process ended"}
        if "error" in answer:
            print(f"The checkout to compare with failed: {answer['error']}", file=sys.stderr)
            return []
        return [float(ms) for ms in answer["ms"]]


def _serve() -> None:
    import measure
    import operators
    import torch

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not stand between two answers
    last: tuple[dict[str, Any], measure.Timer] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        direction = request.pop("direction")
        try:
            if last is None or last[0] != request:
                last = None  # its memory goes first
                torch.cuda.empty_cache()
                dtype = getattr(torch, request["dtype"])
                problem = operators.Problem(request["problem"], dtype, request["shape"])
                operator = operators.OPERATORS[request["operator"]]
                timer = measure.Timer(operator, problem, request["batch"], request["name"], "cuda")
                last = request, timer
            answer: dict[str, Any] = {"ms": last[1].milliseconds(direction)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    _serve()
