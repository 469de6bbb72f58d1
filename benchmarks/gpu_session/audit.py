"""Part 3: whether a training step on this device is right. One row per check: figure and bound.

Several processes train the tests' small configuration side by side (`trainer.py`); here their
results are compared. A check that cannot be made is a row that failed, with the reason.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import rows
import torch

from m3i_scale.cluster.numerics import CUBLAS

HERE = Path(__file__).parent
FOLDER = rows.FOLDER / "audit"
AGREE = 1e-3  # relative, in the norm, between devices and implementations in fp32
WAITS = 5  # for the device in one step
STEPS = 2 if rows.REHEARSE else 6
HALF = STEPS // 2
TWICE = 2 if rows.REHEARSE else 50  # steps that are computed twice
FEW = 1 if rows.REHEARSE else 3
PROCESSES = 2 if rows.REHEARSE else 7
MARGIN = 8  # seconds for the comparisons
END = time.monotonic() + float(os.environ.get("LIMIT", 600)) - MARGIN
MOMENTS = ("exp_avg", "exp_avg_sq")
Result = dict[str, Any]


class NotMadeError(RuntimeError):
    """What a check compares is not there."""


def task(name: str, device: str, precision: str, kernels: str, until: int, **more: Any) -> Result:
    """One training run of `trainer.py`."""
    overrides = {
        "engine.device": device,
        "engine.precision": precision,
        "engine.kernels": kernels,
        "optimizer.duration": f"{STEPS} steps",
        "optimizer.warmup": "1 steps",
        **more.pop("overrides", {}),
    }
    if rows.REHEARSE:  # interpreted, the kernels would take minutes: their tests do that
        overrides |= {"optimizer.global_batch_size": 2, "optimizer.max_micro_batch": 2}
        overrides |= {"engine.kernels": "reference"}
    return {"name": name, "overrides": overrides, "until": until, **more}


def checkpoint(name: str, step: int) -> str:
    """Where a run of `task` leaves its checkpoint."""
    return str(FOLDER / name / "small" / "checkpoints" / f"step-{step:08d}")


def groups() -> dict[str, list[Result]]:
    """Tasks by process; a process does its own in turn."""
    device = rows.DEVICE
    start = {"resume": checkpoint("cpu", 0)}
    exact: Result = {"deterministic": True}
    if _has_key("deterministic"):
        exact = {"overrides": {"engine.deterministic": True}}
    offload = {"overrides": {"engine.zero.offload_optimizer": True}}
    twice = {"overrides": {"engine.verify.every": 1, "optimizer.duration": f"{TWICE} steps"}}
    return {
        "cpu": [task("cpu", "cpu", "fp32", "reference", FEW, save_at=[0])],
        "fp32": [
            task("triton", device, "fp32", "triton", FEW, **start),
            task("reference", device, "fp32", "reference", FEW, **start),
        ],
        "bf16": [
            task("bf16", device, "bf16", "triton", STEPS, synchronisations=True),
            task("twice", device, "bf16", "triton", TWICE, **twice),
        ],
        "deterministic": [
            task("through", device, "bf16", "triton", STEPS, **exact),
            task("half", device, "bf16", "triton", HALF, save_at=[HALF], **exact),
            task(
                "resumed", device, "bf16", "triton", STEPS, resume=checkpoint("half", HALF), **exact
            ),
        ],
        "offload": [
            task("offload", device, "bf16", "reference", HALF, save_at=[HALF], **offload),
            task(
                "offload_resumed", device, "bf16", "reference", HALF,
                resume=checkpoint("offload", HALF), **offload,
            ),
        ],
    }  # fmt: skip


def _has_key(name: str) -> bool:
    from m3i_scale.config import Engine

    return name in Engine.model_fields


def start(name: str, arguments: list[str], **environment: str) -> int:
    """Run one process to its end, with its output in a log; its exit code."""
    variables = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    variables |= {"CUBLAS_WORKSPACE_CONFIG": CUBLAS, "DS_SKIP_CUDA_CHECK": "1", **environment}
    with (FOLDER / f"{name}.log").open("w") as log:
        try:
            done = subprocess.run(
                [sys.executable, *arguments],
                env=variables,
                cwd=rows.ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=max(1, END - time.monotonic()),
            )
        except subprocess.TimeoutExpired:
            log.write("\nstopped: the audit's time is over\n")
            return 124
    return done.returncode


def train(name: str, tasks: list[Result]) -> int:
    """One process of training runs."""
    file = FOLDER / f"{name}.json"
    file.write_text(json.dumps(tasks))
    return start(name, [str(HERE / "trainer.py"), str(file)])


def result(name: str) -> Result:
    """What a training run left.

    Raises:
        NotMadeError: it did not end, and why.
    """
    for group, tasks in groups().items():
        if name in [one["name"] for one in tasks]:
            log = FOLDER / f"{group}.log"
    error = FOLDER / f"{name}.error"
    if error.exists():
        raise NotMadeError(error.read_text())
    if not (FOLDER / f"{name}.pt").exists():
        last = log.read_text().strip().splitlines()[-3:] if log.exists() else ["not started"]
        raise NotMadeError(" | ".join(last))
    return torch.load(FOLDER / f"{name}.pt", weights_only=True)


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative difference of all tensors together, in the norm; NaN where one is not finite."""
    assert found.keys() == expected.keys()
    pairs = [(found[k].double(), expected[k].double()) for k in expected]
    apart = sum(float((a - b).square().sum()) for a, b in pairs)
    return (apart / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


def different(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not the same bit for bit."""
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def part_of(state: dict[str, torch.Tensor], *kinds: str) -> dict[str, torch.Tensor]:
    """The tensors of these kinds: weight, exp_avg, exp_avg_sq, teacher."""
    chosen = {k: v for k, v in state.items() if k.split("/")[0] in kinds}
    assert chosen
    return chosen


def check(name: str, figure: Any, bound: Any, ok: bool, **detail: Any) -> None:
    """Write the row of one check."""
    rows.write("audit", name, ok=ok, figure=figure, bound=bound, **detail)


def agreement() -> None:
    """fp32 steps from the same weights: kernels and devices compute the same."""
    found = {name: result(name) for name in ("cpu", "triton", "reference")}
    for one, other in (("triton", "cpu"), ("reference", "cpu"), ("triton", "reference")):
        a, b = found[one], found[other]
        figures = [
            abs(x[key] - y[key]) / abs(y[key])
            for x, y in zip(a["steps"], b["steps"], strict=True)
            for key in y
        ]
        moved = distance(part_of(a["state"], "weight"), part_of(b["state"], "weight"))
        name = f"fp32, {FEW} steps, {rows.DEVICE} {one} against {other}"
        worst = max(figures)
        check(f"{name}: loss and gradient norm", worst, AGREE, worst <= AGREE, steps=a["steps"])
        check(f"{name}: weights", moved, AGREE, moved <= AGREE)


def waits() -> None:
    """bf16 steps: where the host waits for the device."""
    found = result("bf16")
    per_step = sum(found["waits"].values()) / max(1, found["measured_steps"])
    sites = dict(sorted(found["waits"].items(), key=lambda item: -item[1]))
    note = "not counted on a CPU" if rows.REHEARSE else ""
    check("waits for the device in a step", per_step, WAITS, per_step <= WAITS,
          sites=sites, note=note)  # fmt: skip


def averages() -> None:
    """The teacher that computes is the rounded average."""
    found = result("bf16")
    expected = {
        name.removeprefix("teacher/student."): value.bfloat16()
        for name, value in part_of(found["state"], "teacher").items()
    }
    gathered = {name: found["teacher"][name] for name in expected}
    wrong = different(gathered, expected)
    check("teacher is its averages in bf16", len(wrong), 0, not wrong, differ=wrong[:5])


def verified() -> None:
    """Steps computed twice without `engine.deterministic`, as every run does, are equal."""
    found = result("twice")["verify"]
    steps, problem = found["verify/steps_computed_twice"], found["problem"]
    ok = steps == TWICE and not found["verify/errors"]
    check("steps computed twice and equal bit for bit", steps, TWICE, ok, problem=problem)


def repeatable() -> None:
    """Deterministic steps repeat, and a resumed run is the one that was not interrupted."""
    through, half, resumed = (result(name) for name in ("through", "half", "resumed"))
    steps = [one["loss/total"] for one in through["steps"]]
    again = [one["loss/total"] for one in half["steps"]]
    apart = sum(a != b for a, b in zip(steps, again, strict=False))
    check(f"deterministic: first {HALF} losses again", apart, 0, not apart, losses=[steps, again])
    wrong = different(resumed["opened"], half["state"])
    check("deterministic: resumed with the saved state", len(wrong), 0, not wrong, differ=wrong[:5])
    wrong = different(resumed["state"], through["state"])
    name = f"deterministic: {STEPS} steps against {HALF}, saved, resumed and {STEPS - HALF}"
    far = distance(resumed["state"], through["state"])
    check(name, len(wrong), 0, not wrong, differ=wrong[:5], relative=far,
          of=len(through["state"]))  # fmt: skip


def offload() -> None:
    """With the optimiser in host memory a resumed run has the saved weights and moments."""
    saved, resumed = result("offload"), result("offload_resumed")
    for kind in ("weight", *MOMENTS, "teacher"):
        wrong = different(part_of(resumed["opened"], kind), part_of(saved["state"], kind))
        check(f"offload_optimizer: resumed {kind}", len(wrong), 0, not wrong, differ=wrong[:5])


def cpu_run() -> None:
    """`engine.device=cpu` trains on the CPU of this machine, through the usual command."""
    from cpu_and_stream import STEPS_ON_CPU, cpu_command

    code = start("train_cpu", cpu_command(FOLDER))
    metrics = FOLDER / "data" / "small" / "metrics.jsonl"
    steps = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    ok = code == 0 and steps == STEPS_ON_CPU
    check("engine.device=cpu through train.py: steps", steps, STEPS_ON_CPU, ok, exit_code=code,
          output=(FOLDER / "train_cpu.log").read_text()[-300:])  # fmt: skip


def stream() -> None:
    """Batches of worker processes arrive on the device as they were made."""
    code = start("stream", [str(HERE / "cpu_and_stream.py"), str(FOLDER)])
    file = FOLDER / "stream.json"
    if code or not file.exists():
        raise NotMadeError((FOLDER / "stream.log").read_text()[-400:])
    found = json.loads(file.read_text())
    check("stream: 4 workers, batches unlike the CPU's", found["wrong"], 0,
          not found["wrong"] and found["batches"] > 0, **found)  # fmt: skip


# By the process whose end they wait for.
CHECKS = {
    "bf16": (waits, averages, verified),
    "fp32": (agreement,),
    "deterministic": (repeatable,),
    "offload": (offload,),
}


def made(one: Any) -> bool:
    """Make a check; a row with the reason where it cannot be made."""
    try:
        one()
    except Exception as error:
        check(one.__name__, None, None, False, error=f"{type(error).__name__}: {error}"[:500])
        return False
    return True


def main() -> int:
    """Train, compare, write; 1 where a check failed."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    todo = groups()
    with ThreadPoolExecutor(PROCESSES) as pool:
        first = ("cpu", "bf16", "deterministic", "offload")
        running = {name: pool.submit(train, name, todo[name]) for name in first}
        from cpu_and_stream import write_data

        write_data(FOLDER)
        others = [pool.submit(made, one) for one in (stream, cpu_run)]
        running["cpu"].result()  # it writes the weights that these start from
        running["fp32"] = pool.submit(train, "fp32", todo["fp32"])
        for name, checks in CHECKS.items():
            running[name].result()
            for one in checks:
                made(one)
        for waited in others:
            waited.result()
    return 0 if rows.all_hold("audit") else 1


if __name__ == "__main__":
    sys.exit(main())
