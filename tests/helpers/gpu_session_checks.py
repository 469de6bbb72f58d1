"""Run by test_gpu_session.py in its own process: the audit's comparisons on made-up results."""

from __future__ import annotations

import sys
from typing import Any

import audit
import torch

KINDS = ("weight", "exp_avg", "exp_avg_sq", "teacher")


def result(loss: float = 2.0, weight: float = 1.0) -> dict[str, Any]:
    """What `trainer.py` leaves of a run."""
    state = {f"{kind}/student.w": torch.full((4,), weight) for kind in KINDS}
    figures = {"loss/total": loss, "gradient/all_parameters": 1.0}
    return {
        "steps": [figures] * audit.HALF,
        "opened": state,
        "state": state,
        "teacher": {"w": state["teacher/student.w"].bfloat16()},
        "waits": {"metrics.py:1": 30, "loop.py:2": 2},
        "measured_steps": 4,
        "verify": {
            "verify/steps_computed_twice": audit.TWICE,
            "verify/errors": 0,
            "problem": "",
        },
    }


def main(wrong: list[str]) -> None:
    """Write the results, those of `wrong` changed, and make all checks."""
    audit.FOLDER.mkdir(parents=True)
    for tasks in audit.groups().values():
        for task in tasks:
            name = task["name"]
            if name != "reference":  # a run that never ended
                made = result(loss=2.1, weight=1.1) if name in wrong else result()
                torch.save(made, audit.FOLDER / f"{name}.pt")
    for checks in audit.CHECKS.values():
        for check in checks:
            audit.made(check)


if __name__ == "__main__":
    main(sys.argv[1:])
