"""`srun` for one machine: starts the tasks, says how they failed, ends what is left of them.

What the templates of slurm/ need of it: `--output=FILE-%4t`, options before the command, `srun:
error: NODE: task N: WORDS` for each task that fails, the others ended some time after the first
(`--wait`), and the highest exit code. `SIMULATED_SLURM` names a folder in which it notes the tasks'
process ids. Only the standard library: a start must not cost more than Slurm's.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

WAIT = 10.0  # seconds after the first task that ended, for the others to say why


def main() -> int:
    """Run the tasks."""
    options = [word for word in sys.argv[1:] if word.startswith("--")]
    words = sys.argv[1:]
    while words and words[0].startswith("--"):
        words.pop(0)
    output = next(o.split("=", 1)[1] for o in options if o.startswith("--output="))
    count, node = int(os.environ["SLURM_NTASKS"]), os.environ["SLURM_JOB_NODELIST"]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tasks = [start(words, number, output) for number in range(count)]
    note = Path(os.environ["SIMULATED_SLURM"]) / "tasks.json"
    new = note.with_suffix(".new")
    new.write_text(json.dumps([os.getpid(), *(task.pid for task in tasks)]))
    os.replace(new, note)
    return wait(tasks, node)


def start(words: list[str], number: int, output: str) -> subprocess.Popen[bytes]:
    """One task, leader of its process group."""
    place = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
    with open(output.replace("%4t", f"{number:04}"), "ab") as log:
        return subprocess.Popen(
            words, env=os.environ | place, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def wait(tasks: list[subprocess.Popen[bytes]], node: str) -> int:
    """Until all have ended; the highest exit code."""
    open_tasks, first_end, worst = dict(enumerate(tasks)), None, 0
    while open_tasks:
        for number, task in list(open_tasks.items()):
            if task.poll() is None:
                continue
            del open_tasks[number]
            first_end = first_end or time.monotonic()
            code = task.returncode
            worst = max(worst, code if code >= 0 else 128 - code)
            if code:
                print(f"srun: error: {node}: task {number}: {words_of(code)}", file=sys.stderr)
                sys.stderr.flush()
        if first_end is not None and time.monotonic() - first_end > WAIT:
            kill(tasks)
        time.sleep(0.02)
    kill(tasks)  # their workers
    return worst


def words_of(code: int) -> str:
    """As srun says it."""
    if code > 0:
        return f"Exited with exit code {code}"
    return "Killed" if -code == signal.SIGKILL else signal.strsignal(-code) or str(code)


def kill(tasks: list[subprocess.Popen[bytes]]) -> None:
    """End the tasks and all that they have started."""
    for task in tasks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(task.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
