from __future__ import annotations

from pathlib import Path

import pytest

from helpers.sweeps import GRID, make, write_sweep
from m3i_scale.config import ConfigError
from m3i_scale.config.load import dump_config, load_config, override
from m3i_scale.sweep.grid import cells
from m3i_scale.sweep.spec import load_sweep

SWEEPS = Path(__file__).parents[2] / "experiments" / "m3i_small" / "sweeps"


def test_the_grid_is_the_product_of_axes_and_seeds(tmp_path: Path):
    axes = {"a": [{"name": "x"}, {"name": "y"}], **GRID["axes"]}
    _, grid = make(tmp_path, axes=axes)
    assert [cell.name for cell in grid] == [
        "x-0.5-seed0", "x-one-seed0", "y-0.5-seed0", "y-one-seed0",
        "x-0.5-seed5", "x-one-seed5", "y-0.5-seed5", "y-one-seed5",
    ]  # fmt: skip
    assert [cell.number for cell in grid] == list(range(8))
    assert [cell.seed for cell in grid] == [0] * 4 + [5] * 4
    gammas = [cell.config.objective.balance.gamma for cell in grid]  # type: ignore[union-attr]
    assert gammas == [0.5, 1.0] * 4


def test_every_run_sees_the_same_number_of_samples(tmp_path: Path):
    batches = [{"name": str(n), "set": [f"optimizer.global_batch_size={n}"]} for n in (4, 8)]
    _, grid = make(tmp_path, axes={"batch": batches}, seeds=[3])
    assert [cell.steps for cell in grid] == [11, 6]  # 44 samples
    assert {str(cell.config.optimizer.duration) for cell in grid} == {"44 samples"}
    assert {cell.config.seed for cell in grid} == {3}


def test_long_runs_keep_their_length_through_a_file(tmp_path: Path):
    _, (cell,) = make(tmp_path, samples=12_345_678, seeds=[0], axes={"a": [{"name": "x"}]})
    (tmp_path / "again.yaml").write_text(dump_config(cell.config))
    assert load_config(tmp_path / "again.yaml").optimizer.duration.amount == 12_345_678


def test_later_layers_win(tmp_path: Path):
    (tmp_path / "low.yaml").write_text(
        "optimizer: {clip_norm: 2, epsilon: 0.1, teacher_momentum: 0.1}"
    )
    (tmp_path / "high.yaml").write_text("optimizer: {epsilon: 0.2, teacher_momentum: 0.2}")
    _, (cell,) = make(
        tmp_path,
        config=["small.yaml", "low.yaml"],
        set=["optimizer.weight_decay=0.5", "optimizer.teacher_momentum=0.3"],
        axes={
            "a": [{"name": "x", "config": "high.yaml", "set": ["optimizer.teacher_momentum=0.4"]}]
        },
        seeds=[0],
    )
    spec = cell.config.optimizer
    assert (spec.clip_norm, spec.epsilon, spec.teacher_momentum, spec.weight_decay) == (
        2,
        0.2,
        0.4,
        0.5,
    )


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ({"set": ["model.categories=0"]}, "a category target needs model.categories"),
        ({"set": ["model.decoder.dept=2"]}, "did you mean 'depth'?"),
        ({"config": "absent.yaml"}, "cannot read the configuration file"),
    ],
)
def test_an_impossible_cell_is_named(tmp_path: Path, variant: dict[str, object], words: str):
    with pytest.raises(ConfigError) as caught:
        make(tmp_path, axes={"a": [{"name": "good"}, {"name": "bad", **variant}]})
    assert "cell bad-seed0: " in str(caught.value)
    assert words in str(caught.value)


def test_a_misspelt_change_is_blamed_on_its_text(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        make(tmp_path, set=["optimizer.bach=8"], axes={"a": [{"name": "x"}]}, seeds=[0])
    assert str(caught.value).startswith("cell x-seed0: override 'optimizer.bach=8': unknown key")


@pytest.mark.parametrize("folder", ["a #1", "1e5", "a: b", "$$x/y", "[a", "~$$", "'"])
def test_any_folder_can_hold_a_sweep(tmp_path: Path, folder: str):
    file = write_sweep(tmp_path, axes={"a": [{"name": "1"}]}, seeds=[0])
    sweep = load_sweep(file, [override("folder", f"{tmp_path}/{folder}")])
    (cell,) = cells(sweep, file)
    assert cell.folder == tmp_path / folder.replace("$$", "$") / "small" / "1-seed0"
    (tmp_path / "again.yaml").write_text(dump_config(cell.config))
    assert load_config(tmp_path / "again.yaml") == cell.config


def test_names_that_run_together_are_refused(tmp_path: Path):
    axes = {"a": [{"name": "x"}, {"name": "x-y"}], "b": [{"name": "y-z"}, {"name": "z"}]}
    with pytest.raises(ConfigError, match="cells 3 and 0 are both called x-y-z-seed0"):
        make(tmp_path, axes=axes)


@pytest.mark.parametrize("file", sorted(SWEEPS.glob("table*.yaml")), ids=lambda path: path.stem)
def test_tables_compare_both_backbones(file: Path):
    grid = cells(load_sweep(file, ["seeds=[0]"]), file)
    assert {cell.config.model.backbone.name for cell in grid} == {"vit", "intern_image"}


def test_table_13_changes_gamma_alone():
    file = SWEEPS / "table13.yaml"
    grid = cells(load_sweep(file, ["seeds=[0]"]), file)
    vits = [cell.config for cell in grid if cell.config.model.backbone.name == "vit"]
    assert [c.objective.balance.gamma for c in vits] == [0.2, 0.5, 1, 2, 5, 20]  # type: ignore[union-attr]
    trees = [c.model_dump(exclude={"run": True, "objective": {"balance": {"gamma"}}}) for c in vits]
    assert all(tree == trees[0] for tree in trees)


def test_table_14_has_all_four_pairs_of_target_views():
    file = SWEEPS / "table14.yaml"
    grid = cells(load_sweep(file, ["seeds=[0]"]), file)
    pairs = {}
    for cell in grid:
        views = {t.image: t.view for t in cell.config.objective.targets if not t.supervised}
        pairs[cell.variants["views"].name] = (views["i"], views["j"])
    assert pairs == {
        "same-same": ("same", "same"),
        "different-different": ("other", "other"),
        "different-same": ("other", "same"),
        "same-different": ("same", "other"),
    }
