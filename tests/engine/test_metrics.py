from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from m3i_scale.engine import lines
from m3i_scale.engine.metrics import MetricLog, Speed, machine_values, peak_flops

CPU = torch.device("cpu")


def open_log(folder: Path) -> MetricLog:
    return MetricLog(folder, is_main=True, total=9, first=0)


def entry(step: int) -> dict[str, float]:
    return {"loss/total": 1.0 * step, "images_per_second": 2.0}


def test_slowest_rank_is_named_with_its_ratio_to_the_median():
    # Seconds before the networks started, those of them waiting for data, GiB; by rank.
    own = torch.tensor([[2.0, 1.0, 3.0], [2.0, 1.5, 4.0], [7.0, 6.5, 2.0]], dtype=torch.float64)
    assert machine_values(own, CPU) == {
        "data_wait_seconds": 3.0,
        "machine/longest_data_wait_seconds": 6.5,
        "machine/slowest_rank": 2,
        "machine/slowest_rank_seconds": 7.0,
        "machine/slowest_rank_ratio": 3.5,
        "machine/memory_resident_gib": 4.0,
    }


def test_share_of_the_peak_counts_a_ranks_part_of_the_model_flops():
    values = Speed(flops={"": 3e12}, peak=1e15).values(samples_per_second=400, ranks=8)
    assert values == {"machine/tflops_per_rank": 150.0, "machine/mfu": pytest.approx(0.15)}


def test_where_no_peak_is_known_no_share_is_invented():
    speed = Speed({"": 3e12}, peak_flops(CPU, "bf16"))
    assert list(speed.values(1.0, 1)) == ["machine/tflops_per_rank"]


def test_a_gpus_peak_is_that_of_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    cuda = torch.device("cuda", 0)
    assert peak_flops(cuda, "bf16") == peak_flops(cuda, "fp16") == 989.4e12
    assert peak_flops(cuda, "fp32") is None


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 0}) + '\n{"step": 1, "lo')
    log = open_log(tmp_path)
    log.write(1, entry(1), show=False)
    log.close()
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]


class Full:
    """A file on a disk with little room left."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        part = data[: self.room]
        self.room -= len(part)
        return self.file.write(part)

    def close(self) -> None:
        self.file.close()


def test_a_full_disk_delays_lines_and_loses_none(tmp_path: Path, caplog, monkeypatch):
    monkeypatch.setattr(lines.log, "propagate", True)
    log = open_log(tmp_path)
    disk = Full(log._lines._file, room=100)
    log._lines._file = disk
    for step in range(4):
        log.write(step, entry(step), show=False)
    assert caplog.text.count("No space left on device; its lines are kept in memory") == 1
    disk.room = 10**6
    log.write(4, entry(4), show=False)
    log.close()
    written = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in written] == list(range(5))
