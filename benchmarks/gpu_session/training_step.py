"""Part 5: the training step of InternImage-H on one GPU, by `benchmarks/step.py`; and its plan.

    python training_step.py SECONDS [FOLDER]     ends by itself before that many have passed

FOLDER holds DCNv3's matrix kernels for a Triton that cannot compile them. After the profile come
steps that are computed twice (the first step is not: it would compile all kernels in two forms),
then steps with the gather kernels alone: the difference is what the matrix kernels bring to a step.
Then a run at ZeRO stage 1, which the plan names for one GPU.
Starts at a micro-batch of 128 and goes to 64 and 32 where the memory is too small.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rows

CONFIG = "configs/pretrain_internimage_h.yaml"
OUT_OF_MEMORY = 3
MARGIN = 6  # seconds for the rows
LONGEST = 10  # kernels


def sizes() -> list[int]:
    """Micro-batches, in the order in which they are tried."""
    return [4] if rows.REHEARSE else [128, 64, 32]


def configuration() -> str:
    """InternImage-H; the tests' small configuration in a rehearsal."""
    if not rows.REHEARSE:
        return CONFIG
    from helpers.small import SMALL

    path = rows.FOLDER / "small.yaml"
    path.write_text(SMALL)
    return str(path)


def main(arguments: list[str]) -> int:
    """Measure and write; the exit code of the measurement."""
    seconds, *cubins = arguments
    end = rows.end_of(seconds, MARGIN)
    config = configuration()
    planning = subprocess.Popen([sys.executable, __file__, "plan", config], env=_on_cpu())
    code = OUT_OF_MEMORY
    for micro in sizes():
        out = rows.FOLDER / f"step_{micro}"
        code = measure(config, micro, out, end - time.monotonic(), cubins)
        account(out, micro, code)
        if code != OUT_OF_MEMORY:
            break
    if not code:
        code = whole_weights(config, micro, end, cubins)
    try:
        failed = planning.wait(max(1, end - time.monotonic()))
        why = "see the log of this part"
    except subprocess.TimeoutExpired:
        planning.kill()
        failed, why = 1, "not ready in time"
    if failed:
        rows.write("step", "plan", ok=False, error=why)
    return code or failed


def whole_weights(config: str, micro: int, end: float, cubins: Sequence[str]) -> int:
    """The same step at ZeRO stage 1, where every rank holds all weights; its exit code."""
    out = rows.FOLDER / f"step_{micro}_stage_1"
    counts = (1, 1, 0, 0, 0) if rows.REHEARSE else (3, 6, 0, 0, 0)
    seconds = end - time.monotonic()
    code = measure(config, micro, out, seconds, cubins, counts, "engine.zero.stage=1")
    account(out, micro, code, name=f"ZeRO stage 1, micro-batch {micro}")
    return code


def measure(
    config: str,
    micro: int,
    out: Path,
    seconds: float,
    cubins: Sequence[str] = (),
    counts: Sequence[int] = (1, 2, 1, 1, 1) if rows.REHEARSE else (3, 6, 1, 2, 3),
    *changes: str,
) -> int:
    """Run the benchmark; 124 where it was stopped."""
    command = [sys.executable, "benchmarks/step.py", "--config", config, "--out", str(out)]
    command += ["--micro-batch", str(micro)]
    names = ("--warmup", "--steps", "--profile", "--twice", "--gather-steps")
    for option, count in zip(names, counts, strict=True):
        command += [option, str(count)]
    if cubins and not rows.REHEARSE:
        command += ["--cubins", cubins[0]]
    device = "cpu" if rows.REHEARSE else "cuda"
    variables = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    try:
        done = subprocess.run(
            [*command, f"engine.device={device}", "engine.verify.every=null", *changes],
            cwd=rows.ROOT,
            env=variables,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds:.0f} s", flush=True)
        return 124
    return done.returncode


def account(out: Path, micro: int, code: int, name: str = "") -> None:
    """Rows of what step.py has noted, however far it came."""
    name = name or f"micro-batch {micro}"
    notes = next(iter(out.glob("step_*.json")), None)
    found: dict[str, Any] = json.loads(notes.read_text()) if notes else {}
    longest = {
        "kernel": found.pop("kernels", []),
        "kernel of a step computed twice": found.pop("twice_kernels", []),
    }
    measured = found.get("row", {})
    values = {k: v for k, v in measured.items() if k not in rows.origin()}
    names = ("warmup", "steps", "known_after", "kernel_ms", "dcnv3", "gather_steps", "twice",
             "twice_kernel_ms")  # fmt: skip
    known = {k: found.get(k) for k in names}
    note = {OUT_OF_MEMORY: "out of GPU memory", 124: "stopped by its time limit"}.get(code, "")
    ok = code == 0 and bool(measured)
    own = {"ok": ok, "exit_code": code, "note": note}
    rows.write("step", name, **{**values, **known, **own})
    for kind, kernels in longest.items():
        for kernel in kernels[:LONGEST]:
            rows.write("step", kind, **{**kernel, "kernel": kernel["name"], "micro_batch": micro})


def plan(config_file: str) -> int:
    """Rows of what `m3i plan` says of the same step, for every micro-batch."""
    from m3i_scale.config import load_config
    from m3i_scale.planner.estimate import Cluster, make_plan, trace_of
    from m3i_scale.planner.gpus import gpu

    config = load_config(config_file, [])
    seen = trace_of(config, kernels=True)  # the same for any micro-batch
    for micro in sizes():
        changes = [f"optimizer.global_batch_size={micro}", f"optimizer.max_micro_batch={micro}"]
        config = load_config(config_file, changes)
        made = make_plan(config, seen, Cluster(gpu("h100"), 1, 1))
        rows.write(
            "step",
            f"plan {micro}",
            micro_batch=micro,
            memory_gib=made.peak_memory / 2**30,
            tensors_gib=(made.peak_memory - made.assumed.workspace) / 2**30,
            step_ms=1e3 * made.step,
            computing_ms=1e3 * made.computing,
            utilisation=made.utilisation,
            images_per_second=micro / made.step,
            gflops_per_image=made.flops.model / 1e9,
            hardware_gflops_per_image=made.flops.hardware / 1e9,
            state_gib={name: size / 2**30 for name, size in made.state.items()},
        )
    return 0


def _on_cpu() -> dict[str, str]:
    return {**os.environ, "DS_ACCELERATOR": "cpu"}


if __name__ == "__main__":
    sys.exit(plan(sys.argv[2]) if sys.argv[1] == "plan" else main(sys.argv[1:]))
