"""One process of the audit: trains the tests' small configuration as its tasks say.

    python trainer.py TASKS.json

A task is a JSON object: `name`, `overrides` of the small configuration, `until` (steps), and
optionally `resume` (a checkpoint), `save_at` (steps), `synchronisations` (list them). Its result
goes to NAME.pt beside the file: figures of every step and the state as a checkpoint would hold it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from m3i_kernels import set_backend

from m3i_scale.cluster import launch
from m3i_scale.cluster.launch import World

FIRST_MEASURED = 2  # steps before it make what is made once


def main(arguments: list[str]) -> int:
    """Do all tasks; what a failing one did is in NAME.error and does not stop the next."""
    file = Path(arguments[0])
    tasks = json.loads(file.read_text())
    first = tasks[0]["overrides"]
    world = launch.start(first["engine.device"], first["engine.precision"], 0, 5.0)
    launch.setup_logging(world.rank)
    for task in tasks:
        try:
            torch.save(train(world, file.parent, task), file.parent / f"{task['name']}.pt")
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}"
            (file.parent / f"{task['name']}.error").write_text(text)
    launch.finish()
    return 0


def train(world: World, folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    """Open, train, save; everything that the checks compare."""
    from helpers.small import small_config
    from helpers.training import RandomStream  # these import deepspeed: after `launch.start`
    from m3i_scale.engine import loop, session
    from m3i_scale.tasks.pretraining import Pretraining

    deterministic(bool(task.get("deterministic")))
    torch.backends.cudnn.allow_tf32 = False  # fp32 is compared with a CPU
    config = small_config(folder / task["name"], task["overrides"])
    set_backend(config.engine.kernels)
    stream = RandomStream(config)
    resume = task.get("resume") or "never"
    run = session.open_run(Pretraining(config), world, stream, epoch_samples=64, resume=resume)
    opened = state(run)
    batches = loop.open_batches(run)
    steps = []
    waits: Counter[str] = Counter()
    while True:
        if run.progress.step in task.get("save_at", []):
            loop.save(run)
            run.saver.finish()
        if run.progress.step >= task["until"]:
            break
        counted = task.get("synchronisations") and run.progress.step >= FIRST_MEASURED
        with synchronisations(waits) if counted else contextlib.nullcontext():
            values, _ = loop.train_step(run, batches)
        steps.append({k: float(values[k]) for k in ("loss/total", "gradient/all_parameters")})
        run.progress.step += 1
        run.progress.position += run.split.batch
    result = {"steps": steps, "opened": opened, "state": state(run), "waits": dict(waits)}
    result["teacher"] = teacher(run)
    checks = run.checks or loop.open_checks(run)  # none where nothing was left to train
    verify: dict[str, Any] = {**checks.values(0), "problem": str(checks.problem or "")}
    result["verify"] = verify
    result["measured_steps"] = max(0, task["until"] - FIRST_MEASURED)
    return result


def state(run: Any) -> dict[str, torch.Tensor]:
    """Weights, moments and averages under their checkpoint's names, copied to the CPU."""
    from m3i_scale.engine.state import snapshot

    tensors, _ = snapshot(run.sharded, run.world, run.progress, run.task)
    return {name: value for name, value in tensors.items() if not name.startswith("rng/")}


def teacher(run: Any) -> dict[str, torch.Tensor]:
    """The teacher's weights as its forward pass sees them."""
    import deepspeed

    found = {}
    for name, parameter in run.sharded.model.teacher.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().flatten().cpu().clone()
    return found


def deterministic(wanted: bool) -> None:
    """PyTorch's own switches, which DCNv3 follows."""
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    torch.backends.cudnn.deterministic = wanted
    torch.backends.cudnn.benchmark = False


@contextlib.contextmanager
def synchronisations(sites: Counter[str]) -> Iterator[None]:
    """Count by code line where the host waits for the device."""
    if not torch.cuda.is_available():
        yield
        return

    def note(
        message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if "called a synchronizing CUDA operation" in str(message):
            sites[_site(f"{filename}:{lineno}")] += 1

    whole = torch.cuda.synchronize

    def synchronize(device: Any = None) -> None:  # PyTorch does not warn of the explicit one
        sites[_site("torch.cuda.synchronize")] += 1
        whole(device)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.synchronize = synchronize
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize = whole


def _site(otherwise: str) -> str:
    """The innermost line outside PyTorch, and the innermost of this project that led there."""
    frames = [
        frame
        for frame in traceback.extract_stack()
        if "/torch/" not in frame.filename and frame.filename not in (__file__, warnings.__file__)
    ]
    if not frames:
        return otherwise
    ours = [f for f in frames if "m3i_scale" in f.filename or "m3i_kernels" in f.filename]
    inner = frames[-1]
    text = _short(inner.filename, inner.lineno)
    if ours and ours[-1] is not inner:
        text += f" from {_short(ours[-1].filename, ours[-1].lineno)}"
    return text


def _short(filename: str, line: int | None) -> str:
    parts = Path(filename).parts[-3:]
    return f"{'/'.join(parts)}:{line}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
