"""A Slurm cluster of several nodes on this machine, for the length of a test session.

munged, slurmctld and one slurmd per node run from a folder of their own, under the user who runs
the tests, on free ports; nothing of an installed Slurm configuration is read or changed. Every node
claims one GPU, a plain file, so that the templates' own `--gpus-per-node` lines are honoured.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")

_CONFIGURATION = """\
ClusterName=m3i
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={port}
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
# Short, so that the tests are: a dead node is noticed and a requeued job starts within seconds.
SlurmdTimeout=10
KillWait=20
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
# A job in `urgent` takes the nodes of one in `night`, after the notice that GraceTime gives.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=night Nodes=ALL Default=YES MaxTime=30 PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=30 PriorityTier=10 PreemptMode=off
"""


def missing_program() -> str | None:
    """The first program of Slurm that is not installed, or None."""
    return next((name for name in PROGRAMS if not shutil.which(name, path=_path())), None)


class Cluster:
    """A running cluster; a context manager, whose end leaves no process and no file behind."""

    def __init__(self, nodes: tuple[str, ...] = ("n1", "n2", "n3")) -> None:
        # Not pytest's folder: the path of a Unix socket may have 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.nodes = nodes
        self.environment = _clean_environment() | {
            "PATH": _path(),
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D", "-c")
            for node in self.nodes:
                self.start_node(node)
            self.wait_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in self._daemons.values():
            daemon.kill()
        for daemon in self._daemons.values():
            daemon.wait()
        # Job steps have left their slurmd's process group; what they all share is this variable.
        for pid in processes_with(f"SLURM_CONF={self.environment['SLURM_CONF']}"):
            kill(pid)
        shutil.rmtree(self.folder, ignore_errors=True)

    # ------------------------------------------------------------------------------------- daemons

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """kill -9 the slurmd of a node; its job steps go on without it."""
        self._daemons[node].kill()
        self._daemons[node].wait()

    def wait_idle(self) -> None:
        """Wait until all nodes are up and free."""
        wait_for(lambda: self._idle() == len(self.nodes), 60, "all nodes idle", self.report)

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output, cwd=self.folder,
                preexec_fn=_die_with_parent,
            )  # fmt: skip

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {"socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log",
                 "seed-file": "munge.seed", "key-file": "munge.key"}  # fmt: skip
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self._start("munged", "munged", "--foreground", "--force", "--num-threads=4", *options)
        wait_for((self.folder / "munge.socket").exists, 20, "munged", self.report)

    def _configure(self) -> None:
        host = socket.gethostname().split(".")[0]
        port, *ports = _free_ports(1 + len(self.nodes))
        (self.folder / "state").mkdir()
        lines, gpus = [], []
        for node, node_port in zip(self.nodes, ports, strict=True):
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs=4 "
                "RealMemory=4000 Gres=gpu:1 State=UNKNOWN"
            )
            gpu = self.folder / f"gpu-{node}"
            gpu.touch()
            gpus.append(f"NodeName={node} Name=gpu File={gpu}")
        settings = {"host": host, "user": _user_name(), "folder": self.folder, "port": port,
                    "nodes": "\n".join(lines)}  # fmt: skip
        (self.folder / "slurm.conf").write_text(_CONFIGURATION.format(**settings))
        (self.folder / "gres.conf").write_text("\n".join(gpus) + "\n")

    def _idle(self) -> int:
        states = re.findall(r" State=(\S+)", self.run("scontrol", "show", "node", "-o"))
        return states.count("IDLE")

    # ---------------------------------------------------------------------------------------- jobs

    def run(self, *command: str, environment: dict[str, str] | None = None) -> str:
        """Run a Slurm command from the repository's root; its output, both streams."""
        done = subprocess.run(
            command, env=self.environment | (environment or {}), cwd=REPOSITORY,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60,
        )  # fmt: skip
        return done.stdout

    def submit(self, *arguments: str, environment: dict[str, str] | None = None) -> str:
        """`sbatch` with these arguments; the job id."""
        answer = self.run("sbatch", "--parsable", *arguments, environment=environment)
        assert answer.strip().isdigit(), answer
        return answer.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says about a job."""
        text = self.run("scontrol", "show", "job", "-o", job)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def report(self) -> str:
        """Jobs, nodes and the ends of all logs, for a failure's message."""
        logs = sorted(self.folder.glob("*.log")) + sorted(self.folder.glob("*.out"))
        tails = [f"--- {path.name}\n{tail(path)}" for path in logs]
        return "\n".join([self.run("squeue"), self.run("sinfo", "-N"), *tails])


def wait_for(
    condition: Callable[[], bool], seconds: float, what: str, report: Callable[[], str]
) -> None:
    """Poll until the condition holds; fails with the report after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds} s for {what}\n{report()}")
        time.sleep(0.2)


def processes_with(*variables: str, command: str = "") -> list[int]:
    """Processes with all these `NAME=value` in their environment, `command` in their arguments."""
    wanted, found = {variable.encode() for variable in variables}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            arguments = (folder / "cmdline").read_text(errors="replace")
        except OSError:  # ended meanwhile, or another user's
            continue
        if wanted.issubset(environment) and command in arguments:
            found.append(int(folder.name))
    return found


def kill(pid: int) -> None:
    """kill -9, if it is still there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def tail(path: Path, lines: int = 30) -> str:
    """The last lines of a file."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def _die_with_parent() -> None:
    """Have the kernel kill this process when the tests' process is killed (Linux)."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _path() -> str:
    """PATH with the folders of daemons, which a user's often lacks."""
    return os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin:/usr/local/sbin"


def _clean_environment() -> dict[str, str]:
    """This environment without the variables of a Slurm job or a launcher around the tests."""
    drop = ("SLURM", "SBATCH", "SRUN", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_")
    return {name: value for name, value in os.environ.items() if not name.startswith(drop)}


def _user_name() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports
