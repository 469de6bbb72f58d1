"""slurm/common.sh without Slurm: programs of its names that say what a test wants."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") echo n1 ;;
    "show node") echo " NodeAddr=n1 " ;;
    "show job") echo " JobState=RUNNING Restarts=$SLURM_RESTART_COUNT ExcNodeList=(null) " ;;
    requeue*) echo requeued ;;
esac
"""


class Job:
    """The pre-training template, run by bash; srun is a script of the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "slurm").symlink_to(REPOSITORY / "slurm")
        self.program("scontrol", SCONTROL)

    def program(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def run(self, *words: str, srun: str = "exit 0", **site: str) -> tuple[int, str]:
        self.program("srun", f"#!/bin/bash\n{srun}\n")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "M3I_"))}
        environment = clean | {
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
            "SLURM_RESTART_COUNT": "0", "SLURM_JOB_NODELIST": "n1", "M3I_PREFLIGHT": "no",
            "SLURM_SUBMIT_DIR": str(self.folder), "M3I_PYTHON": sys.executable,
            "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/kernels", **site,
        }  # fmt: skip
        done = subprocess.run(
            ["bash", "slurm/pretrain_internimage_h.sbatch", *words], env=environment, text=True,
            cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
        )  # fmt: skip
        return done.returncode, done.stdout


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def configuration(folder: Path, first: str) -> str:
    text = (REPOSITORY / "configs" / "demo.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("run:", "base:"))]
    base = [line for line in text.splitlines() if line.startswith("base:")]
    moved = [line.replace("base: ", f"base: {REPOSITORY}/configs/") for line in base]
    (folder / "c.yaml").write_text("\n".join([first, *moved, *lines]) + "\n")
    return "c.yaml"


@pytest.mark.parametrize("python", [sys.executable, "true"])
@pytest.mark.parametrize(
    ("line", "name"),
    [("run: 'x'", "x"), ('run: "a name"  # of it', "a name"), ("run: plain # c", "plain")],
)
def test_the_name_is_what_yaml_says_with_or_without_an_interpreter_here(job, line, name, python):
    file = configuration(job.folder, line)
    code, said = job.run(srun='echo "$@"', M3I_CONFIG=file, M3I_PYTHON=python)
    assert code == 0, said
    assert (job.folder / "runs" / name / "logs" / "latest").is_dir()
    assert f"run='{name}'" in (job.folder / "runs" / name / "logs" / "attempts").read_text() + said


def test_an_override_of_the_name_is_heard(job):
    file = configuration(job.folder, "run: x")
    job.run("run=y", "--resume", "never", M3I_CONFIG=file)
    assert [path.name for path in (job.folder / "runs").iterdir()] == ["y"]


def test_a_mistake_in_the_configuration_is_found_before_anything_starts(job):
    file = configuration(job.folder, "run: x")
    code, said = job.run("optimizer.no_such=1", srun="echo started", M3I_CONFIG=file)
    assert code == 2
    assert "no_such" in said
    assert "started" not in said


def test_a_rank_that_cannot_go_on_fails_the_job_whatever_srun_says(job):
    srun = 'echo "rank 3: the sample is bad" >> "$M3I_FAILURE"; exit 137'
    code, said = job.run(srun=srun, M3I_RUN="x")
    assert code == 2
    assert "rank 3: the sample is bad" in said
    assert "requeued" not in said


def test_a_node_that_computes_wrongly_is_excluded_and_the_job_requeued(job):
    code, said = job.run(srun='echo n2 >> "$M3I_BAD_NODES"; exit 89', M3I_RUN="x")
    assert code == 85
    assert "gave a wrong result" in said
    assert "will not run on n2 again" in said


def test_a_wrong_result_of_no_single_node_excludes_none(job):
    code, said = job.run(srun="exit 89", M3I_RUN="x")
    assert code == 85
    assert "will not run on" not in said


def test_the_note_of_an_attempt_before_does_not_count(job):
    job.run(srun='echo "rank 3: bad" >> "$M3I_FAILURE"; exit 137', M3I_RUN="x")
    code, said = job.run(srun="exit 85", M3I_RUN="x", SLURM_RESTART_COUNT="1")
    assert code == 85
    assert "requeued" in said


@pytest.mark.parametrize("code", ["2", "126", "127"])
@pytest.mark.parametrize("preflight", ["yes", "no"])
def test_a_wrong_interpreter_fails_the_job(job, code, preflight):
    result, said = job.run(srun=f"exit {code}", M3I_RUN="x", M3I_PREFLIGHT=preflight)
    assert result == 2
    assert "a restart would not help" in said
    assert "requeued" not in said


OUTPUT = "for a; do case $a in --output=*) f=${a#--output=} ;; esac; done; f=${f//[%]4t/0000}; "


@pytest.mark.parametrize("preflight", ["yes", "no"])
def test_an_interpreter_without_the_project_fails_the_job(job, preflight):
    srun = OUTPUT + 'echo "ModuleNotFoundError: No module named m3i_scale" > "$f"; exit 1'
    result, said = job.run(srun=srun, M3I_RUN="x", M3I_PREFLIGHT=preflight)
    assert result == 2, said
    assert "requeued" not in said


def test_the_rank_that_was_killed_stands_before_the_words_of_rank_0(job):
    srun = OUTPUT + (
        'echo "RuntimeError: Connection closed by peer" > "$f"\n'
        'echo "srun: error: n2: task 5: Killed" >&2; echo "srun: error: n1: task 0: Exited" >&2\n'
        "exit 1"
    )
    code, said = job.run(srun=srun, M3I_RUN="x")
    assert code == 85
    assert "rank 5 failed first (n2: task 5: Killed)" in said
    assert "rank-0005.log" in said
    assert said.index("rank 5 failed first") < said.index("Connection closed by peer")


@pytest.mark.parametrize(("gpus", "code"), [("0", 0), ("h100:8", 0), ("8", 0), ("4", 2)])
def test_no_gpus_may_be_asked_for(job, gpus, code):
    site = {"SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_PER_NODE": gpus}
    assert job.run(M3I_RUN="x", **site)[0] == code


APPTAINER = "#!/bin/bash\n[[ $1 == exec ]] || exit 9\nexit 1\n"


def test_everything_runs_in_an_apptainer_image(job):
    job.program("apptainer", APPTAINER)
    image = job.folder / "m3i.sif"
    image.touch()
    site = {"M3I_CONTAINER": str(image), "M3I_MOUNTS": "/data,/scratch"}
    runs = f"{job.folder}/elsewhere"
    code, said = job.run(srun='printf "<%s>" "$@"', M3I_RUN="x", M3I_FOLDER=runs, **site)
    assert code == 0, said
    binds = "".join(f"<--bind><{folder}>" for folder in (job.folder, runs, "/data", "/scratch"))
    command = f"<{job.folder}/bin/apptainer><exec><--pwd><{job.folder}><--nv>{binds}"
    assert f"{command}<{image}><python><m3i_scale/train.py><--config>" in said
    code, said = job.run(srun='printf "<%s>" "$@"', M3I_RUN="x", M3I_DEVICE="cpu", **site)
    assert "<--nv>" not in said


@pytest.mark.parametrize("image", ["m3i.sqsh", "registry.example#team/m3i:1"])
def test_everything_runs_in_a_container_of_pyxis(job, image):
    (job.folder / "m3i.sqsh").touch()
    here = str(job.folder)
    code, said = job.run(
        srun='printf "<%s>" "$@"; echo "$PYTHONPATH"', M3I_RUN="x", M3I_CONTAINER=image,
        M3I_MOUNTS="/data",
    )  # fmt: skip
    assert code == 0, said
    mounts = f"--container-mounts={here}:{here},/data:/data"
    assert f"<--container-image={image}><{mounts}><--container-workdir={here}>" in said
    assert "<python><m3i_scale/train.py>" in said
    assert f"{here}:{here}/kernels:" in said  # the code is the checkout's


def test_every_template_enters_the_image():
    for template in (REPOSITORY / "slurm").glob("*.sbatch"):
        lines = template.read_text().splitlines()
        here = lines.index("source slurm/container.sh || exit 1")
        assert lines[here - 1].startswith("cd "), template
        assert any(line.startswith(': "${M3I_CONTAINER:=}"') for line in lines[:here]), template


def test_an_image_that_is_not_there_ends_the_job_at_once(job):
    code, said = job.run(srun="echo started", M3I_RUN="x", M3I_CONTAINER="/images/no.sif")
    assert code == 2
    assert "/images/no.sif: there is no such image" in said
    assert "started" not in said


def test_both_images_are_made_of_the_same_files_by_the_same_script():
    containers = REPOSITORY / "containers"
    docker, apptainer = (containers / name for name in ("Dockerfile", "m3i.def"))
    copied = [
        name
        for line in docker.read_text().splitlines() if line.startswith("COPY ")
        for name in line.split()[1:-1]
    ]  # fmt: skip
    files = apptainer.read_text().partition("%files\n")[2].partition("%post")[0]
    pairs = [line.split() for line in files.splitlines() if line.strip()]
    assert [name for name, _ in pairs] == copied
    assert all(target == f"/opt/source/{name}" for name, target in pairs)
    assert all((REPOSITORY / name).exists() for name in copied)
    for text in (docker.read_text(), apptainer.read_text()):
        assert "containers/install.sh /opt/m3i" in text
        assert "PATH=/opt/m3i/bin:$PATH" in text
        assert "python:3.11-slim-bookworm" in text


def test_what_the_images_install(tmp_path):
    python = tmp_path / "python3"
    log = tmp_path / "log"
    python.write_text(
        f'#!/bin/bash\necho "$@" >> {log}\n'
        f'[[ $2 != venv ]] || {{ mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; }}\n'
    )
    python.chmod(0o755)
    subprocess.run(
        [REPOSITORY / "containers" / "install.sh", tmp_path / "m3i"], check=True, cwd=REPOSITORY,
        env=os.environ | {"PYTHON": str(python)},
    )  # fmt: skip
    installed = [line.split("--quiet ")[-1] for line in log.read_text().splitlines()]
    assert installed[2:4] == ["--requirement requirements/lock.txt", "--no-deps ."]
