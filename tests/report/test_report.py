"""`m3i report` on traces whose every second is known."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from m3i_scale import cli
from m3i_scale.report.page import duration, markdown
from m3i_scale.report.read import read_trace
from m3i_scale.report.summary import summarise

T = 1_800_000_000.0  # when the first job was submitted
STEP, DATA = 2.0, 0.5  # seconds of a usual step, and its wait for data


class Recorder:
    """Writes a run folder as the engine does, on a clock that the test sets."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now, self.attempt = folder, T, ""
        folder.mkdir(exist_ok=True)

    def event(self, event: str, file: str = "events.jsonl", **values: Any) -> None:
        line = {"event": event, "attempt": self.attempt, "time": self.now, **values}
        with (self.folder / file).open("a") as out:
            out.write(json.dumps(line) + "\n")

    def start(self, name: str, ranks: int = 2, last_sign: float | None = None,
              submitted: float | None = None, launch: float = 10) -> None:  # fmt: skip
        """Launch `launch` s, imports 20, nodes 10, imports 4, data 5, checkpoint 1; networks."""
        self.attempt, parts = name, []
        for part, seconds in (("launch", launch), ("imports", 20), ("nodes", 10), ("imports", 4),
                              ("data", 5), ("checkpoint", 1)):  # fmt: skip
            parts.append((part, self.now))
            self.now += seconds
        hosts = [f"node{rank // 2}" for rank in range(ranks)]
        self.event("start", parts=parts, ranks=ranks, hosts=hosts, job="7", restart=0,
                   submitted=submitted, last_sign=last_sign)  # fmt: skip
        self.event("part", part="networks")

    def begin(self, step: int, after: float = 30, run: str = "r", rollback: bool = False) -> None:
        self.now += after
        self.event("begin", step=step, run=run, rollback=rollback)

    def step(self, number: int, taken: float = STEP, own: float | None = None, data: float = DATA,
             saving: float = 0.0, name: bool = True, **values: Any) -> None:  # fmt: skip
        """One that ends `taken` + `saving` seconds from now."""
        self.now += taken + saving
        line = {
            "step": number, "time": self.now, "step_seconds": taken if own is None else own,
            "data_wait_seconds": data / 2, "machine/longest_data_wait_seconds": data,
            "loss/total": 3.0 - 0.1 * number, **({"attempt": self.attempt} if name else {}),
            "checkpoint_wait_seconds": saving, **values,
        }  # fmt: skip
        with (self.folder / "metrics.jsonl").open("a") as out:
            out.write(json.dumps(line) + "\n")

    def report(self) -> dict[str, Any]:
        found, _ = summarise(read_trace(self.folder), self.now)
        assert sum(found["shares"].values()) == pytest.approx(found["seconds"])
        for one in found["attempts"]:
            assert sum(one["start_up"].values()) == pytest.approx(one["shares"]["start_up"])
        return found


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path / "run")


def shares(**seconds: float) -> dict[str, Any]:
    names = ("training", "data", "checkpoint", "evaluation", "start_up", "lost", "stalls",
             "queueing", "down", "other")  # fmt: skip
    return pytest.approx({name: seconds.get(name, 0.0) for name in names}, abs=1e-5)


START_UP = 10 + 20 + 10 + 4 + 5 + 1 + 30


def killed_and_stalled(recorder: Recorder) -> None:
    """Ten steps and kill -9; then on four ranks from step 6 on, a stall; then to the end."""
    recorder.now += 100  # queued
    recorder.start("a", submitted=T)
    recorder.begin(0)
    recorder.step(0, taken=STEP + 12)
    for number in range(1, 10):
        recorder.step(number, saving=1.5 if number == 7 else 0.0)
    killed = recorder.now + 5  # 2 s of a step, and 3 s until the last sign of life
    recorder.now = killed + 50 + 200  # 50 s until it is submitted again, 200 s in the queue
    recorder.start("b", ranks=4, last_sign=killed, submitted=killed + 50)
    recorder.begin(6)
    recorder.step(6, taken=STEP + 8)
    for number in range(7, 12):
        recorder.step(number, own=STEP - 0.2, data=DATA)
    recorder.now += 300
    recorder.event("stalled", words="rank 0 has made no step for 298 s")
    recorder.now += 7
    recorder.start("c", ranks=4)
    recorder.begin(12)
    for number in range(12, 20):
        recorder.step(number, **{"machine/slowest_rank": 3, "machine/slowest_rank_seconds": 2.0,
                                 "machine/slowest_rank_ratio": 4.0})  # fmt: skip
    recorder.now += 4
    recorder.event("end", cause="finished", words="", checkpoint_wait_seconds=3.0)


def test_every_second_of_a_run_has_its_share(recorder: Recorder):
    killed_and_stalled(recorder)
    report = recorder.report()
    first, second, third = report["attempts"]
    # Steps 6 to 9 are made again, with the checkpoint wait before step 7; and one was cut short.
    assert first["shares"] == shares(
        training=6 * 1.5, data=6 * 0.5, start_up=START_UP + 12, lost=4 * 2 + 1.5 + 2, stalls=3
    )
    assert first["start_up"] == pytest.approx(
        {"launch": 10, "imports": 24, "nodes": 10, "data": 5, "checkpoint": 1, "networks": 30,
         "first steps": 12}, abs=1e-5,
    )  # fmt: skip
    assert second["shares"] == shares(
        training=6 * 1.5 - 3 * 0.2, other=3 * 0.2, data=6 * 0.5, start_up=START_UP + 8, lost=2,
        stalls=298, down=50, queueing=200,
    )  # fmt: skip
    assert third["shares"] == shares(
        training=8 * 1.5, data=8 * 0.5, checkpoint=3, other=1, start_up=START_UP, down=7
    )
    assert report["seconds"] == pytest.approx(recorder.now - T - 100)
    assert report["queued_before"] == 100
    assert report["effective_ratio"] == pytest.approx((20 * 1.5 - 0.6) / report["seconds"])
    paid = 2 * (first["end"] - first["start"]) + 4 * sum(
        one["end"] - one["start"] for one in (second, third)
    )
    assert report["rank_hours"] == pytest.approx(paid / 3600)
    trained = 2 * 9.0 + 4 * (8.4 + 12)
    assert report["allocation_ratio"] == pytest.approx(trained / paid)
    assert report["steps"] == {"last": 19, "made": 24, "made_again": 4}
    assert [one["cause"] for one in report["attempts"]] == ["killed", "stalled", "finished"]
    assert second["first_step"]["step"] == 6
    assert second["last_step"]["step"] == 11
    assert report["damaged_lines"] == {}


def test_what_each_interruption_cost(recorder: Recorder):
    killed_and_stalled(recorder)
    first, second = recorder.report()["interruptions"]
    assert (first["attempt"], first["cause"], first["steps_made_again"]) == (1, "killed", 4)
    assert first["seconds"] == pytest.approx(
        {"lost": 11.5, "stalls": 3, "queueing": 200, "down": 50, "start_up": START_UP + 8}, abs=1e-5
    )
    assert (second["attempt"], second["cause"], second["steps_made_again"]) == (2, "stalled", 0)
    assert second["seconds"] == pytest.approx(
        {"lost": 2, "stalls": 298, "queueing": 0, "down": 7, "start_up": START_UP}, abs=1e-5
    )
    assert second["cost"] == pytest.approx(sum(second["seconds"].values()))


def test_slow_devices_and_errors_of_the_hardware(recorder: Recorder):
    recorder.start("a")
    recorder.begin(0)
    for number in range(5):
        recorder.step(number, **{"machine/slowest_device_rank": 1,
                                 "machine/slowest_device_seconds": 1.5,
                                 "machine/slowest_device_ratio": 1.5})  # fmt: skip
    words = "rank 1 (node0, cuda:1): exp_avg changed between two updates"
    recorder.event("fault", step=4, words=words, nodes=["node0"])
    recorder.event("fault", step=4, words="not a list", nodes=7)
    recorder.event("end", cause="corrupted", words=words, checkpoint_wait_seconds=0.0)
    report = recorder.report()
    assert report["state"] == "corrupted"
    (rank,), (node,) = report["slowest_devices"], report["slowest_device_nodes"]
    assert (rank["name"], rank["steps"], node["name"]) == ("rank 1", 5, "node0")
    assert rank["delay"] == pytest.approx(5 * 0.5)
    assert [fault["nodes"] for fault in report["faults"]] == [["node0"], []]
    page = markdown(report, "report.png")
    assert "## Slowest inside the step" in page
    assert "## Errors of the hardware" in page
    assert words in page


def test_the_slowest_ranks_and_their_nodes(recorder: Recorder):
    killed_and_stalled(recorder)
    report = recorder.report()
    (rank,), (node,) = report["slowest_ranks"], report["slowest_nodes"]
    assert rank == {"name": "rank 3", "steps": 8, "delay": pytest.approx(8 * 1.5)}
    assert node == {"name": "node1", "steps": 8, "delay": pytest.approx(8 * 1.5)}
    periods = report["slowest_over_time"]
    assert sum(period["worst"]["steps"] for period in periods) == 8
    assert {period["host"] for period in periods} == {"node1"}


def test_damaged_lines_are_named_and_their_time_is_not_lost(recorder: Recorder):
    killed_and_stalled(recorder)
    whole = recorder.report()
    path = recorder.folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[4] = lines[4][:30] + b"\n"  # step 4 of the first attempt
    lines[13] = b"\0" * 80 + b"\n"  # step 9 of the second
    path.write_bytes(b"".join(lines) + b'{"step": 20, "time"')
    (recorder.folder / "events.jsonl").open("a").write('["event"]\n{"event": "begin"}\n')
    report = recorder.report()
    assert report["damaged_lines"] == {"metrics.jsonl": [5, 14, 25], "events.jsonl": [12, 13]}
    for name in ("start_up", "lost", "stalls", "queueing", "down", "checkpoint"):
        assert report["shares"][name] == pytest.approx(whole["shares"][name]), name
    useful = sum(whole["shares"][name] for name in ("training", "data", "other"))
    assert sum(report["shares"][n] for n in ("training", "data", "other")) == pytest.approx(useful)


@pytest.mark.parametrize("gone", ["start", "begin", "both"])
def test_damaged_events_leave_the_steps(recorder: Recorder, gone: str):
    killed_and_stalled(recorder)
    path = recorder.folder / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    kept = [
        line for line in lines
        if not ('"b"' in line and json.loads(line)["event"] in {gone, *(["start", "begin", "part"]
                if gone == "both" else [])})
    ]  # fmt: skip
    assert len(kept) < len(lines)
    path.write_text("".join(kept))
    report = recorder.report()
    assert [one["steps"] for one in report["attempts"]] == [10, 6, 8]
    assert report["steps"]["made_again"] == 4


@pytest.mark.parametrize("ranks", [0, -2, 10**12])
def test_a_start_on_no_possible_number_of_ranks_is_damaged(recorder: Recorder, ranks: int):
    killed_and_stalled(recorder)
    path = recorder.folder / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[0] = json.dumps(json.loads(lines[0]) | {"ranks": ranks}) + "\n"
    path.write_text("".join(lines))
    report = recorder.report()
    assert report["damaged_lines"] == {"events.jsonl": [1]}
    assert report["attempts"][0]["ranks"] is None


def test_a_run_that_goes_on(recorder: Recorder, monkeypatch: pytest.MonkeyPatch):
    recorder.start("a")
    owner = {"renewed": T, "alive": True}
    monkeypatch.setattr(
        "m3i_scale.engine.lock.sign_of_life", lambda _: (owner["renewed"], owner["alive"])
    )
    recorder.now += 9
    (starting,) = recorder.report()["attempts"]
    assert (starting["cause"], starting["first_step"]) == ("running", None)
    assert starting["shares"] == shares(start_up=START_UP - 30 + 9)
    assert starting["start_up"]["networks"] == pytest.approx(9)
    recorder.begin(0, after=21)
    for number in range(10):
        recorder.step(number)
    recorder.now += 1.5  # of a step
    report = recorder.report()
    assert report["state"] == "running"
    assert report["shares"] == shares(start_up=START_UP, training=15, data=5)
    recorder.now += 100  # by now it has stalled
    assert recorder.report()["shares"]["stalls"] == pytest.approx(101.5)
    owner |= {"renewed": recorder.now - 90, "alive": False}  # no: it was killed
    report = recorder.report()
    assert report["state"] == "killed"
    assert report["shares"] == shares(start_up=START_UP, training=15, data=5, lost=2, stalls=9.5)


def test_a_rollback_is_an_interruption_within_an_attempt(recorder: Recorder):
    recorder.start("a")
    recorder.begin(0)
    for number in range(8):
        recorder.step(number)
    recorder.begin(5, after=11, rollback=True)
    for number in range(5, 12):
        recorder.step(number)
    recorder.event("end", cause="stopped", words="SIGTERM", checkpoint_wait_seconds=0.0)
    report = recorder.report()
    assert report["shares"] == shares(
        start_up=START_UP + 11, training=12 * 1.5, data=12 * 0.5, lost=3 * 2
    )
    (one,) = report["interruptions"]
    assert (one["cause"], one["steps_made_again"]) == ("rollback", 3)
    assert one["cost"] == pytest.approx(3 * 2 + 11)


def test_a_step_that_hangs_and_goes_on_has_stalled(recorder: Recorder):
    recorder.start("a")
    recorder.begin(0)
    for number in range(20):
        recorder.step(number, taken=STEP + (60 if number == 9 else 0))
    recorder.event("end", cause="finished", words="", checkpoint_wait_seconds=0.0)
    assert recorder.report()["shares"] == shares(
        start_up=START_UP, training=20 * 1.5, data=20 * 0.5, stalls=60
    )


def test_attempts_that_die_before_training_are_start_up(recorder: Recorder):
    recorder.start("a")
    recorder.now += 12
    recorder.event("end", cause="crashed", words="OutOfMemoryError", checkpoint_wait_seconds=0.0)
    recorder.now += 3
    recorder.start("b")
    recorder.begin(0)
    for number in range(10):
        recorder.step(number)
    recorder.event("end", cause="finished", words="", checkpoint_wait_seconds=0.0)
    first, second = recorder.report()["attempts"]
    assert first["shares"] == shares(start_up=START_UP - 30 + 12)
    assert second["shares"] == shares(start_up=START_UP, down=3, training=15, data=5)


def test_another_ranks_error_is_the_cause(recorder: Recorder):
    recorder.start("a")
    recorder.begin(0)
    for number in range(10):
        recorder.step(number)
    words = "sample k has category 9, but model.categories is 5"
    recorder.event("end", file="events-rank-00001.jsonl", cause="error", words=words)
    recorder.now += 1
    recorder.event("end", cause="crashed", words="RuntimeError: connection closed by peer")
    (one,) = recorder.report()["attempts"]
    assert (one["cause"], one["words"]) == ("error", words)


def test_a_launcher_that_restarts_its_ranks_is_not_counted_twice(recorder: Recorder):
    recorder.start("a", launch=10)
    launched = T
    recorder.begin(0)
    for number in range(10):
        recorder.step(number)
    ended = recorder.now
    recorder.event("end", cause="crashed", words="x", checkpoint_wait_seconds=0.0)
    # Six seconds later torchrun, the same one, starts the ranks again.
    recorder.start("b", launch=6)
    path = recorder.folder / "events.jsonl"
    path.write_text(path.read_text().replace(f'["launch", {ended}]', f'["launch", {launched}]'))
    recorder.begin(10)
    for number in range(10, 20):
        recorder.step(number)
    recorder.event("end", cause="finished", words="", checkpoint_wait_seconds=0.0)
    report = recorder.report()
    assert report["attempts"][1]["start_up"]["launch"] == pytest.approx(6)
    assert report["seconds"] == pytest.approx(recorder.now - T)


def test_steps_of_another_version_have_no_events(recorder: Recorder):
    for number in (*range(10), *range(6, 12)):
        recorder.step(number, name=False)
    report = recorder.report()
    assert [one["steps"] for one in report["attempts"]] == [10, 6]
    assert report["rank_hours"] is None
    assert report["shares"]["lost"] == pytest.approx(4 * 2 + 0)
    assert report["shares"]["training"] == pytest.approx(12 * 1.5)
    # This version goes on with the run.
    recorder.start("a")
    recorder.begin(12)
    recorder.step(12)
    assert [one["steps"] for one in recorder.report()["attempts"]] == [10, 6, 1]


def test_a_run_that_began_anew_in_a_used_folder_has_its_own_time_only(recorder: Recorder):
    recorder.start("a")
    recorder.begin(0, run="old")
    for number in range(10):
        recorder.step(number)
    recorder.event("end", cause="stopped", words="SIGTERM", checkpoint_wait_seconds=0.0)
    aside = recorder.folder / "set-aside" / "2027"
    aside.mkdir(parents=True)
    recorder.start("b")
    for name in ("metrics.jsonl", "events.jsonl"):
        (aside / name).write_text((recorder.folder / name).read_text())
    (recorder.folder / "metrics.jsonl").unlink()
    recorder.begin(0, run="new")
    for number in range(10):
        recorder.step(number)
    recorder.event("end", cause="finished", words="", checkpoint_wait_seconds=0.0)
    assert [one["name"] for one in recorder.report()["attempts"]] == ["b"]
    old, _ = summarise(read_trace(aside), recorder.now)
    assert [one["name"] for one in old["attempts"]] == ["a"]


def test_a_branch_that_was_set_aside_is_lost_time(recorder: Recorder):
    recorder.start("a")
    recorder.begin(0)
    for number in range(10):
        recorder.step(number)
    recorder.event("end", cause="stopped", words="SIGTERM", checkpoint_wait_seconds=0.0)
    aside = recorder.folder / "set-aside" / "2027"
    aside.mkdir(parents=True)
    metrics = recorder.folder / "metrics.jsonl"
    (aside / "metrics.jsonl").write_text(metrics.read_text())
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:4]))
    recorder.start("b")
    recorder.begin(4)  # --resume PATH of the checkpoint of step 4
    for number in range(4, 8):
        recorder.step(number)
    recorder.event("end", cause="finished", words="", checkpoint_wait_seconds=0.0)
    report = recorder.report()
    assert report["steps"]["made_again"] == 6
    assert report["shares"]["lost"] == pytest.approx(12)


def test_evaluations_have_their_time_and_their_curves(recorder: Recorder, tmp_path: Path, capsys):
    recorder.start("a")
    recorder.begin(0)
    for number in range(8):
        if number % 2:
            recorder.step(number)
            continue
        # Longer than a stall would be: half a minute after a step of two seconds.
        figures = {"evaluation/knn_caption": 10.0 + number, "evaluation_seconds": 30.0}
        recorder.step(number, taken=STEP + 30, own=STEP, **figures)
    recorder.now += 100
    recorder.start("b")
    recorder.begin(6)
    again = {"evaluation/knn_caption": 50.0, "evaluation_seconds": 30.0}
    recorder.step(6, taken=STEP + 30, own=STEP, **again)
    recorder.event("end", cause="finished", words="", checkpoint_wait_seconds=0.0)
    report = recorder.report()
    first, second = report["attempts"]
    assert first["shares"]["evaluation"] == pytest.approx(3 * 30)  # that of step 6 is lost
    assert second["shares"]["evaluation"] == pytest.approx(30)
    assert first["shares"]["training"] == pytest.approx(6 * 1.5)
    assert report["evaluations"]["knn_caption"] == [[0, 10], [2, 12], [4, 14], [6, 50]]
    assert cli.main(["report", str(recorder.folder), "--out", str(tmp_path / "out")]) == 0
    assert "| knn_caption | 4 | 10 (0) | 50 (6) | 10 | 50 |" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_writes_page_picture_and_numbers(recorder: Recorder, tmp_path, capsys):
    killed_and_stalled(recorder)
    assert cli.main(["report", str(recorder.folder), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written == json.loads(json.dumps(recorder.report()))
    page = (tmp_path / "out" / "report.md").read_text()
    assert page in said
    assert f"**Effective-time ratio {100 * written['effective_ratio']:.1f} %**" in page
    assert "| 2 | 7 | 4 |" in page
    assert "stalled: rank 0 has made no step for 298 s" in page
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "out").glob("*.new"))
    assert cli.main(["report", str(recorder.folder)]) == 0
    assert (recorder.folder / "report.md").read_text() == page


def test_no_run_and_an_empty_one_are_sentences(tmp_path: Path, capsys):
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    assert "name the folder of a run" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no line of events or metrics can be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(4.21, "4.2 s"), (59.96, "60.0 s"), (750, "12 min 30 s"), (3599.9, "60 min 0 s"),
     (18420, "5 h 7 min"), (273600, "3 d 4 h")],
)  # fmt: skip
def test_durations(seconds: float, words: str):
    assert duration(seconds) == words


def test_a_month_is_read_in_seconds(recorder: Recorder):
    recorder.start("a")
    recorder.begin(0)
    recorder.step(0)
    line = (recorder.folder / "metrics.jsonl").read_text()
    with (recorder.folder / "metrics.jsonl").open("a") as out:
        for number in range(1, 30_000):
            recorder.now += STEP
            out.write(
                line.replace('"step": 0', f'"step": {number}').replace(
                    f'"time": {recorder.now - number * STEP}', f'"time": {recorder.now}'
                )
            )
    begun = time.perf_counter()
    assert recorder.report()["steps"]["made"] == 30_000
    assert time.perf_counter() - begun < 10


BROKEN = {"collective": "all_reduce of 9 float32", "cause": "crashed", "words": "closed by peer"}


@pytest.mark.parametrize(
    ("told", "cause", "said"),
    [
        # Rank 1 is killed: rank 0 only knows that a collective broke.
        ({0: BROKEN}, "killed", "rank 1 (node0) ended without a word; rank 0 in all_reduce"),
        ({1: BROKEN}, "killed", "rank 0 (node0) ended without a word; rank 1 in all_reduce"),
        ({0: BROKEN, 1: BROKEN}, "crashed", "rank 0 in all_reduce of 9 float32: closed by peer"),
        # The rank that was wrong itself knows better than those whose collectives it broke.
        ({0: BROKEN, 1: {"cause": "crashed", "words": "KeyError: x"}}, "crashed", "KeyError: x"),
        ({0: {"cause": "crashed", "words": "KeyError: x"}, 1: BROKEN}, "crashed", "KeyError: x"),
        ({0: BROKEN, 1: {"cause": "error", "words": "sample k"}}, "error", "sample k"),
        # Watchdogs: the frozen rank says nothing; one that hangs elsewhere than in a collective is
        # the one to look at.
        ({0: {"words": "rank 0: it is in all_reduce"}}, "stalled", "rank 1 (node0) said nothing"),
        ({1: {"words": "rank 1: it is in all_reduce"}}, "stalled", "rank 0 (node0) said nothing"),
        (
            {0: {"words": "rank 0: it is in all_reduce"},
             1: {"words": "rank 1: it is in no collective; the last one was x"}},
            "stalled", "rank 1: it is in no collective; the last one was x",
        ),
        ({0: BROKEN, 1: {"words": "rank 1: it is in all_reduce"}}, "stalled", "rank 1: it is in"),
        ({}, "killed", "no rank said a word"),
    ],
)  # fmt: skip
def test_the_cause_is_what_came_first(recorder: Recorder, told, cause, said):
    recorder.start("a")
    recorder.begin(0)
    recorder.step(0)
    for rank, values in told.items():
        file = "events.jsonl" if rank == 0 else f"events-rank-{rank:05d}.jsonl"
        recorder.event("end" if "cause" in values else "stalled", file=file, **values)
    (one,) = recorder.report()["attempts"]
    assert one["cause"] == cause
    assert said in one["words"]


def test_a_preemption_that_left_no_time_to_save_is_told_from_a_death(recorder: Recorder):
    recorder.start("a")
    recorder.begin(0)
    recorder.step(0)
    recorder.event("asked", step=1, words="SIGTERM")
    (one,) = recorder.report()["attempts"]
    assert one["cause"] == "killed"
    assert one["words"] == "asked to stop by SIGTERM, and killed before it had saved"


def test_what_srun_said_of_the_rank_that_failed_first(recorder: Recorder):
    recorder.start("a")
    recorder.begin(0)
    recorder.step(0)
    logs = recorder.folder / "logs" / "7-0"
    logs.mkdir(parents=True)
    (logs / "srun.log").write_text("srun: x\nsrun: error: node0: task 1: Killed\nsrun: task 0: Y\n")
    (one,) = recorder.report()["attempts"]
    assert (one["cause"], one["job"], one["restart"]) == ("killed", "7", 0)
    assert one["words"] == "no rank said a word; srun: task 1: Killed"


def test_checkpoints_that_do_not_count_are_listed(recorder: Recorder):
    recorder.start("a")
    recorder.event("passed over", step=8, words="rank 1: x.safetensors does not match its checksum")
    recorder.begin(4)
    recorder.step(4)
    recorder.event("unsaved", step=5, words="rank 0: No space left on device")
    recorder.event("unsaved", step=None)
    report = recorder.report()
    found = [(one["attempt"], one["step"], one["what"]) for one in report["checkpoint_faults"]]
    assert found == [(1, 8, "passed over"), (1, 5, "not written"), (1, None, "not written")]
    page = markdown(report, "report.png")
    assert "## Checkpoints that do not count" in page
    assert "No space left on device" in page


def test_a_rank_that_holds_up_all_others_for_a_while_is_named(recorder: Recorder):
    def slow(rank: int, ratio: float = 2.0) -> dict[str, float]:
        return {"machine/slowest_device_rank": rank, "machine/slowest_device_ratio": ratio,
                "machine/slowest_device_seconds": STEP * ratio}  # fmt: skip

    recorder.start("a")
    recorder.begin(0)
    for number in range(30):  # as fast as each other, almost
        recorder.step(number, **slow(number % 2, 1.02))
    begin = recorder.now
    for number in range(30, 40):  # with one step in between that was not slow
        recorder.step(number, **slow(1 if number != 34 else 0, 2.0 if number != 34 else 1.02))
    end = recorder.now
    for number in range(40, 60):  # now and then a rank is slow, never for long
        recorder.step(number, **slow(1, 3.0 if number % 5 == 3 else 1.0))
    report = recorder.report()
    (spell,) = report["slow_spells"]
    assert (spell["attempt"], spell["rank"], spell["host"]) == (1, 1, "node0")
    assert (spell["first_step"], spell["last_step"]) == (30, 39)
    assert (spell["begin"], spell["end"]) == (pytest.approx(begin), pytest.approx(end))
    assert spell["delay"] == pytest.approx(9 * STEP)
    assert "| rank 1 node0 | 18.0 s |" in markdown(report, "report.png")
