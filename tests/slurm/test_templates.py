"""The other templates: accepted by Slurm as they are, and doing their work."""

from __future__ import annotations

import re
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from helpers.slurm_cluster import REPOSITORY, tail

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

TEMPLATES = sorted(path.name for path in (REPOSITORY / "slurm").glob("*.sbatch"))
SMALL = ("--nodes=1", "--cpus-per-task=1", "--mem=1G")


def test_there_is_a_template_for_every_job():
    assert TEMPLATES == [
        "bench_kernels.sbatch",
        "build_shards.sbatch",
        "detect.sbatch",
        "evaluate.sbatch",
        "finetune.sbatch",
        "pretrain_internimage_h.sbatch",
        "pretrain_vit_b16.sbatch",
        "segment.sbatch",
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_slurm_accepts_the_template(cluster, name):
    trains = "m3i_scale/train.py" in (REPOSITORY / "slurm" / name).read_text()
    one = ("--ntasks-per-node=1", "--gpus-per-node=1") if trains else ()
    answer = cluster.run("sbatch", "--test-only", *SMALL, "--time=20", *one, f"slurm/{name}")
    assert re.search(r"Job \d+ to start at .* on nodes n\d", answer), answer
    assert "error" not in answer.lower()


@pytest.mark.parametrize("name", TEMPLATES)
def test_everything_of_a_site_stands_in_one_block(name):
    text = (REPOSITORY / "slurm" / name).read_text()
    before, block, after = re.split(r"# =+ .*\n", text)
    for outside in (before, after):
        for word in ("partition", "account", "module", "apptainer", "--container", "--time="):
            assert word not in outside
    for word in (
        "##SBATCH --partition",
        "##SBATCH --account",
        "# module purge",
        "# python=(apptainer",
    ):
        assert word in block


@pytest.mark.parametrize("name", [*TEMPLATES, "common.sh", "container.sh"])
def test_shell_syntax(name):
    subprocess.run(["bash", "-n", str(REPOSITORY / "slurm" / name)], check=True)


def test_shards_are_indexed_by_an_array(pretraining, tmp_path):
    shards = pretraining.folder
    (tmp_path / "list").write_text(
        f'index --kind text -o {tmp_path}/text.parquet "{shards}/te*.tar"\n'
        f"index --kind category -o {tmp_path}/category.parquet {shards}/category.tar\n"
    )
    job = pretraining.cluster.submit(
        *SMALL, "--time=10", "--array=1-3", f"--output={tmp_path}/%a.log",
        "slurm/build_shards.sbatch", f"{tmp_path}/list",
        environment={"M3I_PYTHON": sys.executable},
    )  # fmt: skip
    for task in (1, 2):
        pretraining.finish(f"{job}_{task}")
    assert pq.read_metadata(tmp_path / "text.parquet").num_rows == 1  # one shard
    assert pq.read_metadata(tmp_path / "category.parquet").num_rows == 1
    assert pretraining.finish(f"{job}_3", state="FAILED")["ExitCode"] == "2:0"
    assert "has no line 3" in tail(tmp_path / "3.log")


def test_benchmarks_are_started(pretraining, tmp_path):
    job = pretraining.cluster.submit(
        *SMALL, "--time=10", f"--output={tmp_path}/log", "slurm/bench_kernels.sbatch", "--help",
        environment={"M3I_PYTHON": sys.executable},
    )  # fmt: skip
    pretraining.finish(job)
    assert "usage: run.py" in (tmp_path / "log").read_text()
