"""Trackers: what each is told in the terms of its library, and that none ever harms training."""

from __future__ import annotations

import csv
import json
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from m3i_scale.config import Config, ConfigError
from m3i_scale.engine import tracker_backends, trackers
from m3i_scale.engine.metrics import MetricLog
from m3i_scale.engine.tracker_backends import Opening
from m3i_scale.engine.trackers import Trackers
from m3i_scale.transfer.commands import track_evaluation
from m3i_scale.transfer.evaluation import TaskScore

ROWS = [{"task": "kNN", "trained": 0.5, "labels": 3}, {"task": "probe", "trained": 0.6}]


def opening(folder: Path, first: int | None = 0) -> Opening:
    return Opening(folder, "mine", "0a1b2c", "project", {"seed": 3}, first)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "mixes.png"
    Image.new("RGB", (4, 3), (255, 0, 0)).save(path)
    return path


def tell_everything(names: list[str], folder: Path, picture: Path, first: int = 0) -> Trackers:
    told = Trackers(names, opening(folder, first))
    for step in range(first, first + 3):
        told.scalars(step, {"loss/total": 3.0 - step, "learning_rate": 0.1})
    told.picture(first, "mixes", picture)
    told.table(first + 2, "eval", ROWS)
    told.close()
    assert told.switched_off == 0
    return told


# ----------------------------------------------------------------------------- the real packages


def test_tensorboard_hides_the_steps_that_are_made_again(tmp_path: Path, picture: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tell_everything(["tensorboard"], tmp_path, picture)
    tell_everything(["tensorboard"], tmp_path, picture, first=1)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    values = [(event.step, event.value) for event in events.Scalars("loss/total")]
    assert values == [(0, 3.0), (1, 2.0), (2, 1.0), (3, 0.0)]
    (image,) = [image for image in events.Images("mixes") if image.step == 1]
    assert (image.width, image.height) == (4, 3)
    text = events.Tensors("eval/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "| kNN | 0.5 | 3 |" in text


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_gains_columns_and_replaces_steps(tmp_path: Path, picture: Path):
    tell_everything(["csv"], tmp_path, picture)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("3,17")  # cut short by a crash
    told = Trackers(["csv"], opening(tmp_path, first=2))
    told.scalars(2, {"loss/total": 7.0, "learning_rate": 0.1})
    told.scalars(3, {"loss/total": 8.0, "accuracy/x": 0.25})
    told.close()
    rows = read_csv(tmp_path / "metrics.csv")
    assert [(row["step"], row["loss/total"], row["accuracy/x"]) for row in rows] == [
        ("0", "3.0", ""), ("1", "2.0", ""), ("2", "7.0", ""), ("3", "8.0", "0.25"),
    ]  # fmt: skip
    table = read_csv(tmp_path / "eval.csv")
    assert [row["trained"] for row in table] == ["0.5", "0.6"]
    assert {row["step"] for row in table} == {"2"}


# ------------------------------------------------------- stand-ins with the documented functions


class Wandb(ModuleType):
    """wandb.init(project, id, name, dir, config, resume, mode) -> Run; Image(path); Table(...)."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.said: list[Any] = []

    def init(self, *, project: str, id: str, name: str, dir: str, config: dict[str, Any],
             resume: str, mode: str) -> SimpleNamespace:  # fmt: skip
        self.said.append(("init", project, id, resume, mode))

        def define_metric(name: str, step_metric: str | None = None) -> None:
            self.said.append(("axis", name, step_metric))

        return SimpleNamespace(
            log=lambda data: self.said.append(data),
            finish=lambda: self.said.append("finish"),
            define_metric=define_metric,
        )

    Image = staticmethod(lambda path: ("image", path))
    Table = staticmethod(lambda *, columns, data: ("table", columns, data))


def test_wandb_goes_on_in_the_same_run_and_offline_without_a_key(tmp_path, picture, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "nowhere"))
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    tell_everything(["wandb"], tmp_path, picture)
    assert module.said[0] == ("init", "project", "0a1b2c", "allow", "offline")
    assert module.said[1:3] == [("axis", "step", None), ("axis", "*", "step")]
    assert module.said[3] == {"step": 0, "loss/total": 3.0, "learning_rate": 0.1}
    assert module.said[6] == {"step": 0, "mixes": ("image", str(picture))}
    columns = ["task", "trained", "labels"]
    data = [["kNN", 0.5, 3], ["probe", 0.6, None]]
    assert module.said[7:] == [{"step": 2, "eval": ("table", columns, data)}, "finish"]
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password key\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    tell_everything(["wandb"], tmp_path, picture, first=1)
    assert ("init", "project", "0a1b2c", "allow", "online") in module.said


def test_trackio(tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[Any] = []

    def init(*, project: str, name: str, config: dict[str, Any], resume: str) -> SimpleNamespace:
        said.append((project, name, config, resume))
        return SimpleNamespace(
            log=lambda metrics, step: said.append((step, metrics)),
            finish=lambda: said.append("finish"),
        )

    module = ModuleType("trackio")
    module.init = init  # type: ignore[attr-defined]
    module.Image = lambda path: ("image", path)  # type: ignore[attr-defined]
    module.Table = lambda *, dataframe: ("table", dataframe)  # type: ignore[attr-defined]
    pandas = ModuleType("pandas")
    pandas.DataFrame = list  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    tell_everything(["trackio"], tmp_path, picture)
    assert said[0] == ("project", "mine-0a1b2c", {"seed": 3}, "allow")
    assert said[1] == (0, {"loss/total": 3.0, "learning_rate": 0.1})
    assert said[4:] == [(0, {"mixes": ("image", str(picture))}), (2, {"eval": ("table", ROWS)}),
                        "finish"]  # fmt: skip


class MlflowClient:
    """The functions of mlflow.MlflowClient that are used, over one store."""

    def __init__(self, tracking_uri: str | None = None) -> None:
        self.store = STORE
        self.store.setdefault("uri", tracking_uri)

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        return SimpleNamespace(experiment_id="7") if "experiment" in self.store else None

    def create_experiment(self, name: str, artifact_location: str | None = None) -> str:
        self.store["experiment"] = (name, artifact_location)
        return "7"

    def search_runs(self, experiment_ids: list[str], filter_string: str = "",
                    max_results: int = 1000) -> list[Any]:  # fmt: skip
        assert filter_string == "tags.`m3i.run` = '0a1b2c'"
        return [SimpleNamespace(info=SimpleNamespace(run_id=r)) for r in self.store["runs"]]

    def create_run(self, experiment_id: str, start_time: int | None = None,
                   tags: dict[str, str] | None = None,
                   run_name: str | None = None) -> SimpleNamespace:  # fmt: skip
        assert (experiment_id, tags, run_name) == ("7", {"m3i.run": "0a1b2c"}, "mine")
        self.store["runs"].append("r1")
        return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    def update_run(self, run_id: str, status: str | None = None) -> None:
        self.store["said"].append(("status", run_id, status))

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        assert json.loads(text) == {"seed": 3}

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        self.store["said"].append([(m.key, m.value, m.step) for m in metrics])

    def log_artifact(self, run_id: str, local_path: str) -> None:
        self.store["said"].append(("artifact", local_path))

    def log_table(self, run_id: str, data: dict[str, list[Any]], artifact_file: str) -> None:
        self.store["said"].append((artifact_file, data))

    def set_terminated(self, run_id: str) -> None:
        self.store["said"].append(("terminated", run_id))


STORE: dict[str, Any] = {}


def metric(key: str, value: float, timestamp: int, step: int) -> SimpleNamespace:
    return SimpleNamespace(key=key, value=value, step=step)


def test_mlflow(tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    STORE.clear()
    STORE.update(runs=[], said=[])
    module, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    module.MlflowClient = MlflowClient  # type: ignore[attr-defined]
    entities.Metric = metric  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    tell_everything(["mlflow"], tmp_path, picture)
    assert STORE["uri"] == f"sqlite:///{tmp_path}/mlflow.db"
    assert STORE["experiment"] == ("project", (tmp_path / "mlflow-artifacts").as_uri())
    said = STORE["said"]
    assert said[0] == [("loss/total", 3.0, 0), ("learning_rate", 0.1, 0)]
    table = {"step": [2, 2], "task": ["kNN", "probe"], "trained": [0.5, 0.6], "labels": [3, None]}
    assert said[3:] == [("artifact", str(picture)), ("eval.json", table), ("terminated", "r1")]
    tell_everything(["mlflow"], tmp_path, picture, first=1)
    assert STORE["runs"] == ["r1"]
    assert ("status", "r1", "RUNNING") in said


# ----------------------------------------------------------------------------- never harms training


class Broken:
    """A tracker that fails in the second step."""

    def __init__(self, opening: Opening) -> None:
        self.first = opening.first

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if step == 1:
            raise ConnectionError("no route to host")

    def picture(self, step: int, name: str, path: Path) -> None: ...
    def table(self, step: int, name: str, rows: Any) -> None: ...
    def close(self) -> None: ...


def figures(step: int) -> dict[str, float]:
    return {"loss/total": float(step), "images_per_second": 1.0}


def test_an_exception_switches_one_tracker_off_and_is_counted(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(trackers.log, "propagate", True)
    monkeypatch.setitem(tracker_backends.BACKENDS, "wandb", Broken)
    told = Trackers(["wandb", "csv"], opening(tmp_path))
    record = MetricLog(tmp_path, is_main=True, total=4, first=0, trackers=told)
    record.write(0, figures(0), show=False)
    record.write(1, figures(1), show=False)
    told._workers[0]._thread.join(10)
    record.write(2, figures(2), show=False)
    record.close()
    words = "tracker wandb is switched off, training goes on: ConnectionError"
    assert caplog.text.count(words) == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("trackers_switched_off") for line in lines] == [None, None, 1]
    assert [row["step"] for row in read_csv(tmp_path / "metrics.csv")] == ["0", "1", "2"]


def test_a_tracker_that_cannot_be_opened_is_switched_off(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(trackers.log, "propagate", True)

    def refuse(_: Opening) -> Any:
        raise RuntimeError("api_key not configured")

    monkeypatch.setitem(tracker_backends.BACKENDS, "wandb", refuse)
    told = Trackers(["wandb"], opening(tmp_path))
    told.close()
    assert told.switched_off == 1
    assert "api_key not configured" in caplog.text


def test_a_tracker_that_hangs_holds_nobody(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(trackers.log, "propagate", True)
    monkeypatch.setattr(trackers, "WAITING", 5)
    going_on = threading.Event()

    class Hanging(Broken):
        def scalars(self, step: int, values: dict[str, float]) -> None:
            going_on.wait(30)

    monkeypatch.setitem(tracker_backends.BACKENDS, "wandb", Hanging)
    told = Trackers(["wandb"], opening(tmp_path))
    for step in range(20):
        told.scalars(step, {})
    told.close(seconds=0.1)
    going_on.set()
    assert caplog.text.count("does not keep up") == 1
    assert "has not ended after 0.1 s and is left behind" in caplog.text


def test_the_picture_of_the_first_step_is_shown_once(tmp_path, monkeypatch):
    shown: list[tuple[int, str]] = []

    class Watching(Broken):
        def picture(self, step: int, name: str, path: Path) -> None:
            shown.append((step, name))

    monkeypatch.setitem(tracker_backends.BACKENDS, "wandb", Watching)
    told = Trackers(["wandb"], opening(tmp_path))
    record = MetricLog(tmp_path, is_main=True, total=4, first=0, trackers=told, picture="mixes.png")
    Image.new("RGB", (4, 3)).save(tmp_path / "mixes.png")
    record.write(0, figures(0), show=False)
    record.write(2, figures(2), show=False)
    record.close()
    assert shown == [(0, "mixes")]


# ----------------------------------------------------------------------------------- configuration


def test_a_missing_package_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(trackers.PACKAGES, "wandb", ("not_there", "'m3i-scale[wandb]'"))
    with pytest.raises(ConfigError, match=r"has wandb, .* pip install 'm3i-scale\[wandb\]'"):
        trackers.require_packages(["csv", "wandb"])
    trackers.require_packages(["tensorboard", "csv"])


@pytest.mark.parametrize(
    ("logging", "words"),
    [({"tensorboard": True}, "tensorboard"), ({"trackers": ["csv", "csv"]}, "name each once"),
     ({"trackers": ["wandbb"]}, "wandb"), ({"project": ""}, "project")],
)  # fmt: skip
def test_what_the_configuration_refuses(small_tree, logging, words):
    small_tree["logging"] = logging
    with pytest.raises(ValueError, match=words):
        Config.model_validate(small_tree)


def test_the_table_of_an_evaluation_and_its_pictures(tmp_path, small_tree, picture, monkeypatch):
    small_tree["logging"] = {"trackers": ["csv", "wandb"]}
    monkeypatch.setitem(trackers.PACKAGES, "wandb", ("not_there", ""))
    (tmp_path / "metrics.csv").write_text("step,loss/total\n0,3.0\n9,1.0\n")
    rows = [TaskScore("kNN", 0.5, 0.1, 0.2, 100, 5)]
    track_evaluation(tmp_path, Config.model_validate(small_tree), 4, rows)
    (row,) = read_csv(tmp_path / "eval.csv")
    assert (row["step"], row["task"], row["trained"]) == ("4", "kNN", "0.5")
    assert [r["step"] for r in read_csv(tmp_path / "metrics.csv")] == ["0", "9"]
