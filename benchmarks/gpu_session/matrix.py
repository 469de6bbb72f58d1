"""Part 7: DCNv3's matrix kernels beside the gather kernels, by `kernels/bench/matrix_check.py`.

    python matrix.py SECONDS [FOLDER]     ends by itself before that many have passed

FOLDER holds the kernels, compiled where there is Triton 3.8 (`matrix_check.py --compile FOLDER`);
without it this machine's Triton compiles them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

import rows
from m3i_kernels.dcnv3.matrix_op import choose_matrix_tiles

PROGRAM = rows.ROOT / "kernels" / "bench" / "matrix_check.py"
MARGIN = 6  # seconds for the imports and the last row
OLDEST = (3, 8)  # Triton that compiles them


def main(arguments: list[str]) -> int:
    """Run the check and account for it; its exit code."""
    seconds, *folder = arguments
    missing = why_not(folder)
    if missing:
        rows.write("matrix", "skipped", ok=True, note=missing)
        return 0
    end = rows.end_of(seconds, MARGIN)
    command = [sys.executable, str(PROGRAM), "--seconds", str(end - time.monotonic())]
    if folder:
        command += ["--cubins", folder[0]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        account(process.stdout or [])
    return process.returncode


def why_not(folder: list[str]) -> str:
    """Say why the check cannot run here, or nothing."""
    if rows.REHEARSE:
        return "they need a GPU"
    version = rows.version("triton")
    if not folder and tuple(map(int, version.split(".")[:2])) < OLDEST:
        return f"Triton {version} cannot compile them: give run.sh --cubins FOLDER"
    return ""


def account(lines: Iterable[str]) -> None:
    """Write the row of every JSON line as it comes."""
    for line in lines:
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            print(line, end="", flush=True)
            continue
        values = row_of(found)
        rows.write("matrix", values.pop("name"), **values)


def row_of(found: dict[str, Any]) -> dict[str, Any]:
    """A line of the check with the names that a session's rows have."""
    right = bool(found.get("right", True) and found.get("repeats", True))
    if "time" in found:
        name, share = found.pop("time"), found.pop("share_of_copy")
        kernel = found.pop("kernel")
        more = {"implementation": kernel, "fraction_of_copy": share}
        if kernel == "matrix":
            size = int(name.split()[0]) >> 1 + int(name.split()[-1])
            chosen = choose_matrix_tiles(size * (size + size % 2), found["direction"] == "backward")
            more["shipped"] = (found["P"], found["NW"]) == tuple(chosen)
        return {"name": name, "kind": "time", "ok": True, **found, **more}
    if "copy_gb_per_s" in found:
        return {"name": "copy", "ok": True, "gb_per_s": found["copy_gb_per_s"]}
    for kind in ("check", "limit"):
        if kind in found:
            return {"name": str(found.pop(kind)), "kind": kind, **found, "ok": right}
    return {"name": "end", **found, "ok": bool(found.get("all_right", False))}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
