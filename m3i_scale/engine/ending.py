"""How a training process ends: exit codes, the sentence for the user, and the note for the job.

0 finished; 2 something that a restart would not mend; 85 saved and stopped because it was asked to;
87 stalled; 88 taken for dead by another start; 89 a device, its memory or the network was found to
be wrong (`corruption`): nodes to blame are then in the file that `M3I_BAD_NODES` names; 130
interrupted while starting; 1 anything else.

With NCCL a rank that ends leaves the others waiting in a collective until they are killed, and what
the launcher then reports is that kill. The rank therefore leaves its sentence in the file that
`M3I_FAILURE` names, where the batch script finds it (slurm/common.sh).
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from m3i_scale.arguments import one_line

MISTAKE, CRASH, INTERRUPTED = 2, 1, 130
NOTE = "M3I_FAILURE"
BAD_NODES = "M3I_BAD_NODES"  # a file: nodes to leave out, one a line

# What the operating system will refuse again: full, forbidden, not what the path says.
PERMANENT = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR,
    errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG,
}  # fmt: skip


def exit_code(error: BaseException) -> int | None:
    """The exit code of an error that one sentence explains; None for a fault of the program."""
    if getattr(error, "for_users", False):
        return int(getattr(error, "exit_code", MISTAKE))
    if isinstance(error, OSError) and error.errno is not None:
        return MISTAKE if error.errno in PERMANENT else CRASH
    return None


def explain(error: BaseException, code: int) -> None:
    """Print the sentence: once a node, or on the rank that alone knows it.

    Once a node, because a file may be missing on one of them only, and no rank can ask the others
    any more.
    """
    from m3i_scale.cluster.launch import os_error_sentence

    alone = isinstance(error, OSError) or getattr(error, "on_one_rank", False)
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or rank
    if local != "0" and not alone:
        return
    sentence = one_line(os_error_sentence(error) if isinstance(error, OSError) else str(error))
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        _note_nodes(error)
    if code == MISTAKE and os.environ.get(NOTE):
        with contextlib.suppress(OSError), Path(os.environ[NOTE]).open("a") as file:
            file.write(f"rank {rank}: {sentence}\n")


def _note_nodes(error: BaseException) -> None:
    """Append the nodes to blame to the file that the batch script reads."""
    nodes: Sequence[str] = getattr(error, "nodes", ())
    if nodes and os.environ.get(BAD_NODES):
        with Path(os.environ[BAD_NODES]).open("a") as file:
            file.writelines(f"{node}\n" for node in nodes)


def end_on_interrupt() -> None:
    """Until training has a handler, SIGINT ends the process at once, with one line.

    The line goes to a copy of standard error: DeepSpeed points the original elsewhere while it
    tries a compiler.
    """
    copy = os.dup(sys.__stderr__.fileno()) if sys.__stderr__ else None

    def end(*_: object) -> None:
        if copy is not None:
            with contextlib.suppress(OSError):
                os.write(copy, b"interrupted before training began\n")
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, end)
