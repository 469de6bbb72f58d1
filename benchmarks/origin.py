"""Where the figures of a benchmark come from."""

from __future__ import annotations

import contextlib
import datetime
import platform
import re
from pathlib import Path


def origin() -> dict[str, str]:
    """Processor, versions, commit and date, for the file of results."""
    import deepspeed
    import torch

    from m3i_scale.engine.metrics import git_commit

    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        known = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        processor = known[0] if known else processor
    return {
        "processor": processor,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "commit": git_commit() or "unknown",
        "date": datetime.date.today().isoformat(),
    }
