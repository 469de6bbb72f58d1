from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.small import SMALL
from m3i_scale.config import (
    Config,
    ConfigError,
    Duration,
    Input,
    Objective,
    dump_config,
    load_config,
)
from m3i_scale.config.detection import Detection, Jitter, Sides
from m3i_scale.config.errors import nodes_in
from m3i_scale.config.load import CHOOSING, load_run
from m3i_scale.config.tasks import TASKS
from m3i_scale.config.types import Node

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_every_number_of_table_7():
    h = load_config(CONFIGS / "pretrain_internimage_h.yaml")
    v = load_config(CONFIGS / "pretrain_vit_b16_imagenet.yaml")
    y = load_config(CONFIGS / "pretrain_vit_b16_yfcc.yaml")
    decoders = [(c.decoder.depth, c.decoder.width, c.decoder.ffn, c.decoder.heads)
                for c in (v.model, h.model)]  # fmt: skip
    assert decoders == [(4, 768, 3072, 16), (4, 1024, 4096, 16)]
    assert (v.data.image_size, h.data.image_size) == (224, 192)
    assert [str(c.optimizer.duration) for c in (v, y, h)] == [
        "1600 epochs",
        "138 epochs",
        "30 epochs",
    ]
    assert [c.optimizer.warmup.amount for c in (v, y, h)] == [40, 3.5, 1]
    assert [c.optimizer.global_batch_size for c in (v, y, h)] == [4096, 4096, 40000]
    for config in (v, y, h):
        spec = config.optimizer
        assert (spec.betas, spec.learning_rate, spec.weight_decay) == ((0.9, 0.95), 1e-3, 0.1)
        assert (spec.teacher_momentum, spec.teacher_momentum_final) == (0.995, 1.0)
        given = config.objective.input
        assert (given.corruption, given.mask, given.ratio, given.patch) == ("mix", "block", 0.5, 16)
        views = {t.image: t.view for t in config.objective.targets if not t.supervised}
        assert views == {"i": "same", "j": "other"}
        for target in config.objective.targets:
            if target.representation == "category":
                assert target.likelihood.label_smoothing == 0.1  # type: ignore[union-attr]
    paths = [c.model.backbone.options for c in (v, h)]
    assert [(o["drop_path_rate"], o["drop_path_type"]) for o in paths] == [
        (0.1, "linear"), (0.2, "uniform"),
    ]  # fmt: skip


def test_overrides_are_yaml(file: Path):
    config = load_config(
        file,
        [
            "optimizer.duration=2e3 samples",
            "objective.targets.0.weight=2",
            "engine.zero.extra.a=[1]",
        ],
    )
    assert config.optimizer.duration == Duration(2000, "samples")
    assert config.objective.targets[0].weight == 2
    assert config.engine.zero.extra == {"a": [1]}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.decoder.widht=3", "unknown key 'model.decoder.widht'; did you mean 'width'?"),
        ("optimiser.batch=3", "unknown key 'optimiser'; did you mean 'optimizer'?"),
        ("objective.targets.0.likelihood.sigm=2", "did you mean 'sigma'?"),
        ("optimizer.batch=8", "it is called 'optimizer.global_batch_size' now"),
        ("optimizer.length=8 steps", "it is called 'optimizer.duration' now"),
        ("optimizer.ema=0.9", "it is called 'optimizer.teacher_momentum' now"),
        ("objective.targets.0.guard=none", "it is called 'regularisation' now"),
        ("objective.targets.0.encoder=momentum", "take one of teacher, student, or describe it"),
        ("optimizer.duration=soon", "'soon' is not a duration"),
        ("optimizer.global_batch_size=many", "optimizer.global_batch_size"),
        ("optimizer.max_micro_batch=3", "multiple of 2"),
        ("data.augmentation.views=1", "set data.augmentation.views: 2"),
        (
            "data.mixed_sizes=[{size: 56}, {size: 64}]",
            "56 is not a multiple of objective.input.patch 16",
        ),
        ("data.mixed_sizes=[{size: 128}, {size: 192}]", "set image_size: 192, or add 64"),
        ("data.mixed_sizes=[{size: 64}, {size: 64}]", "mixed_sizes has a size twice"),
        ("data.mixed_sizes=[]", "data.mixed_sizes"),
        ("data.image_size=70", "70 is not a multiple of objective.input.patch 16"),
        ("engine.precision=fp8", "engine.precision"),
        ("objective.targets.0.regularisation=none", "without regularisation collapses"),
        ("objective.targets.0.regularisation=negatives", "negatives enter through a softmax"),
        ("objective.targets.2.regularisation=none", "set regularisation: negatives"),
        ("objective.targets.1.positions=masked", "masked positions"),
        ("objective.targets.1.name=image_i", "names must differ"),
        ("objective.input.corruption=mask", "of image j, which only a mix contains"),
        ("objective.targets.2.likelihood.temperature=1", "share one likelihood"),
        ("model.text=null", "model.text.tokenizer"),
        ("model.categories=0", "model.categories"),
        ("data.sources.0.kind=category", "no data source of kind text"),
        ("data.sources.0.weight=2", "some sources have a weight and some have not"),
        ("data.augmentation.scale=[0.5, 0.2]", "[0.5, 0.2] runs backwards"),
        ("data.augmentation.view_b.blur_sigma=[2, 1]", "[2, 1] runs backwards"),
        ("objective.targets.9.name=a", "'objective.targets' is a list with entries 0 to"),
        ("objective.targets.-1.name=a", "is a list with entries 0 to"),
        (
            "optimizer.global_batch_size.x=1",
            "'optimizer.global_batch_size' is 8 and has no key 'x'",
        ),
        ("nonsense", "not of the form"),
        ("a..b=1", "not of the form"),
        ("=1", "not of the form"),
        ("data.mean=[0.5, 0.5", "value '[0.5, 0.5' cannot be read"),
        ("data.mean=[0.5, 0.5", "the default is [0.485, 0.456, 0.406]"),
        ("model=small", "model: write a mapping of its keys, {key: value, ...} (got 'small')"),
        ("data.sources=[]", "data.sources: give it 1 or more entries (got [])"),
        (
            "data.mean=0.5",
            "write a list, [a, b, ...] (got 0.5); the default is [0.485, 0.456, 0.406]",
        ),
        ("data.mean=[0.5]", "data.mean: too few values (got [0.5])"),
        ("data.workers=several", "(got 'several'); the default is 8"),
        ("optimizer.global_batch_size=8 # small", "got '8 # small'"),
        ("run=2026", "for text, write it in quotes"),
        ("engine.zero.extra={a: 1, a: 2}", "'a' stands twice"),
        ("data.chunk_megabytes=4", "it is called 'data.chunk_mebibytes' now"),
        ("data.storage.cache_gigabytes=4", "it is called 'data.storage.cache_gibibytes' now"),
        (
            "objective.targets.0.likelihood={sigma: 1}",
            "write form: gaussian or form: boltzmann or form: sigmoid",
        ),
        ("checkpoint.every=0 steps", "'0 steps' is no length of time"),
        ("checkpoint.keep_every=0.0 epochs", "is no length of time"),
        ("optimizer.duration=0 samples", "is no length of time"),
        ("optimizer.duration=1e400 samples", "longer than 1e+15 samples"),
        ("optimizer.duration=1.2.3 epochs", "not a duration"),
        ("optimizer.duration=-1 epochs", "not a duration"),
        ("optimizer.duration=nan epochs", "not a duration"),
        ("optimizer.learning_rate=.inf", "finite"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas.1"),
        ("objective.balance.decay=1", "objective.balance.decay"),
    ],
)
def test_what_is_wrong_is_one_sentence(file: Path, override: str, words: str):
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"override {override!r}: ")
    assert str(file) not in str(caught.value)


def test_overrides_are_taken_whole(file: Path):
    config = load_config(file, ["run=a #2", "optimizer.learning_rate=1e-4", "folder=/x/my #1/runs"])
    assert config.run_folder == Path("/x/my #1/runs/a #2")
    assert config.optimizer.learning_rate == 1e-4
    extra = load_config(file, ["engine.zero.extra={a: 1e-3, b: [2e5]}"]).engine.zero.extra
    assert extra == {"a": 1e-3, "b": [2e5]}


@pytest.mark.parametrize("text", ["1e-1 epochs", "0.1 epoch", "1E-1epochs", ".1 epochs"])
def test_durations(file: Path, text: str):
    config = load_config(file, [f"optimizer.duration={text}", "optimizer.warmup=0 steps"])
    assert config.optimizer.duration == Duration(0.1, "epochs")
    assert config.optimizer.warmup.amount == 0
    file.write_text(dump_config(config))
    assert load_config(file) == config


def test_what_is_wrong_is_blamed_on_the_file_and_line_that_set_it(file: Path):
    folder = file.parent
    (folder / "low.yaml").write_text(
        "seed: 1\noptimizer:\n  global_batch_size: many\n  betas: [0.9, 2]\n"
    )
    top = folder / "top.yaml"
    top.write_text("base: [small.yaml, low.yaml]\nrun: top\n")
    with pytest.raises(ConfigError, match=r"/low\.yaml:3: optimizer\.global_batch_size: "):
        load_config(top)
    with pytest.raises(ConfigError, match=r"/low\.yaml:4: optimizer\.betas\.1: "):
        load_config(top, ["optimizer.global_batch_size=8"])
    top.write_text(
        "base: [small.yaml, low.yaml]\noptimizer: {global_batch_size: 8, betas: [0.9, 3]}\n"
    )
    with pytest.raises(ConfigError, match=r"/top\.yaml:2: optimizer\.betas\.1: "):
        load_config(top)
    top.write_text("base: small.yaml\nseed: 1\nmodell: {}\n")
    with pytest.raises(ConfigError, match=r"/top\.yaml:3: unknown key 'modell'; did you mean"):
        load_config(top, ["run=x"])


def test_a_rule_among_keys_is_blamed_on_the_override_that_broke_it(file: Path):
    changes = ["run=x", "optimizer.global_batch_size=16", "model.categories=0", "seed=3"]
    with pytest.raises(ConfigError, match=r"^override 'model\.categories=0': a category target"):
        load_config(file, changes)


def test_a_misspelt_key_is_named_before_what_is_missing_for_it(file: Path):
    tree = yaml.safe_load(SMALL)
    tree["modle"] = tree.pop("model")
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match="unknown key 'modle'; did you mean 'model'"):
        load_config(file)


def test_keys_that_stand_twice_are_refused_in_every_file(file: Path):
    top = file.with_name("top.yaml")
    top.write_text("base: small.yaml\noptimizer:\n  batch: 8\n  ema: 0.9\n  batch: 16\n")
    with pytest.raises(ConfigError, match=r"top\.yaml:5: the key 'batch' stands twice .*line 3"):
        load_config(top)
    file.write_text(SMALL + "\nrun: again\n")
    top.write_text("base: small.yaml\n")
    with pytest.raises(ConfigError, match=r"small\.yaml:\d+: the key 'run' stands twice"):
        load_config(top)


@pytest.mark.parametrize("base", ["", "5", "[null]", "{a: b}", "''", "[a.yaml, 3]", "true"])
def test_a_base_that_names_no_file_is_refused(tmp_path: Path, base: str):
    (tmp_path / "a.yaml").write_text("seed: 1")
    (tmp_path / "top.yaml").write_text(f"run: x\nbase: {base}\n")
    with pytest.raises(ConfigError, match=r"top\.yaml:2: base: the name of a file") as caught:
        load_config(tmp_path / "top.yaml")
    assert "\n" not in str(caught.value)


def test_no_base_at_all_can_be_written_as_an_empty_list(file: Path):
    file.write_text(f"base: []\n{SMALL}")
    assert load_config(file).run == "small"


def test_files_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "text.yaml").write_bytes(b"run: \xff\xfe\xe4")
    for name, words in (
        ("loop.yaml", "symbolic links"),
        (".", "Is a directory"),
        ("empty.yaml", "found nothing"),
        ("text.yaml", "not valid YAML"),
        ("a\0b", "cannot be the name of a file"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            load_config(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_an_override_changes_one_place_and_nothing_else(file: Path):
    top = file.with_name("top.yaml")
    top.write_text(
        "base: small.yaml\nengine: {zero: {extra: {a: &a {x: 1}, b: *a, c: {<<: *a}}}}\n"
    )
    extra = load_config(top, ["engine.zero.extra.a.x=2"]).engine.zero.extra
    assert extra == {"a": {"x": 2}, "b": {"x": 1}, "c": {"x": 1}}


def test_targets_without_a_source_are_dropped_on_request(file: Path):
    drop = "objective.without_source=drop"
    whole = load_config(file, [drop])
    assert whole.objective.targets == load_config(file).objective.targets
    captions = load_config(file, [drop, "data.sources.1.kind=text", "model.categories=0"])
    wanted = [t for t in whole.objective.targets if t.representation != "category"]
    assert 0 < len(wanted) < len(whole.objective.targets)
    assert captions.objective.targets == wanted
    file.with_name("dumped.yaml").write_text(dump_config(captions))
    assert load_config(file.with_name("dumped.yaml")) == captions
    categories = load_config(file, [drop, "data.sources.0.kind=category", "model.text=null"])
    assert {t.representation for t in categories.objective.targets} == {"features", "category"}


def test_what_is_left_without_a_source_must_be_possible(file: Path):
    text = (
        "{name: t, representation: text, regularisation: negatives, "
        "likelihood: {form: boltzmann, temperature: 0.07}}"
    )
    changes = ["objective.without_source=drop", "data.sources.0.kind=category"]
    with pytest.raises(ConfigError, match="no target is left"):
        load_config(file, [*changes, "objective.balance=null", f"objective.targets=[{text}]"])
    features = (
        "{name: f, representation: features, regularisation: stop_gradient, "
        "likelihood: {form: gaussian}}"
    )
    with pytest.raises(ConfigError, match=r"set objective\.balance: null") as caught:
        load_config(file, [*changes, f"objective.targets=[{features}, {text}]"])
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "absent.yaml")
    for text, words in (
        ("a: [", "not valid YAML"),
        ("- a", "a mapping"),
        ("run: x", "missing key"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=words):
            load_config(tmp_path / "bad.yaml")


def test_bases_are_merged_in_order_and_circles_are_named(file: Path):
    folder = file.parent
    (folder / "other.yaml").write_text("optimizer: {global_batch_size: 16}\nseed: 5")
    (folder / "top.yaml").write_text("base: [small.yaml, other.yaml]\nrun: top")
    config = load_config(folder / "top.yaml")
    assert (config.run, config.seed, config.optimizer.global_batch_size) == ("top", 5, 16)
    assert config.optimizer.max_micro_batch == 8
    (folder / "other.yaml").write_text("base: top.yaml")
    with pytest.raises(ConfigError, match="circle"):
        load_config(folder / "top.yaml")


TARGETS = """
objective:
  targets:
    - {name: p, representation: pixels, likelihood: {form: gaussian}}
    - {name: c, representation: category, regularisation: negatives, likelihood: {form: boltzmann}}
"""


def test_a_file_that_states_targets_states_the_whole_objective(file: Path):
    low = file.with_name("low.yaml")
    low.write_text(
        "base: small.yaml\nobjective:\n  without_source: drop\n  balance: {gamma: 7}\n"
        "  input: {corruption: mask, ratio: 0.9, both_views: true}\n"
    )
    method = file.with_name("method.yaml")
    method.write_text(TARGETS)
    for config in (load_config(low, over=[method]), load_config(layered(file, "low", "method"))):
        assert [target.name for target in config.objective.targets] == ["p", "c"]
        alone = Objective(targets=config.objective.targets, without_source="drop")
        assert config.objective == alone  # whether targets may be dropped is said of the data
    method.write_text(f"{TARGETS}  input: {{corruption: none}}\n")
    assert load_config(low, over=[method]).objective.input == Input(corruption="none")
    method.write_text("objective: {input: {ratio: 0.8}}")  # no targets: merged key by key
    merged = load_config(file, over=[method]).objective
    assert merged.model_dump(exclude={"input"}) == load_config(file).objective.model_dump(
        exclude={"input"}
    )
    assert merged.input.ratio == 0.8


def layered(file: Path, *names: str) -> Path:
    top = file.with_name("layered.yaml")
    top.write_text(f"base: [{', '.join(f'{name}.yaml' for name in names)}]\n")
    return top


def test_an_override_of_the_targets_leaves_the_rest_of_the_objective(file: Path):
    features = (
        "{name: f, representation: features, regularisation: stop_gradient, "
        "likelihood: {form: gaussian}}"
    )
    changes = [f"objective.targets=[{features}]", "objective.balance=null"]
    config = load_config(file, ["objective.input.ratio=0.3", *changes])
    assert config.objective.input.ratio == 0.3


def test_one_kind_of_target_cannot_be_balanced(small_tree: dict[str, Any]):
    small_tree["objective"]["targets"] = small_tree["objective"]["targets"][:2]
    with pytest.raises(ValueError, match="balance: null"):
        Config.model_validate(small_tree)
    small_tree["objective"]["balance"] = None
    assert Config.model_validate(small_tree).objective.balance is None


def test_the_tree_cannot_be_changed(small: Config):
    with pytest.raises(ValueError, match="frozen"):
        small.seed = 3  # type: ignore[misc]


def test_the_small_configuration_of_the_tests_is_valid():
    assert Config.model_validate(yaml.safe_load(SMALL)).run == "small"


@pytest.mark.parametrize("value", [0, 0.5, 1, "by_length"])
def test_a_momentum_is_a_number_or_by_length(small_tree: dict[str, Any], value: object):
    small_tree["optimizer"]["teacher_momentum"] = value
    assert Config.model_validate(small_tree).optimizer.teacher_momentum == value


@pytest.mark.parametrize("value", ["by_lenght", -0.1, 1.5, True, None, "nan"])
def test_what_is_no_momentum_is_refused_with_what_is(small_tree: dict[str, Any], value: object):
    small_tree["optimizer"]["teacher_momentum"] = value
    with pytest.raises(ValueError, match="a number from 0 to 1, or by_length"):
        Config.model_validate(small_tree)


def detection(folder: Path, text: str) -> Path:
    """A file over a detector whose training images have random sides."""
    (folder / "sides.yaml").write_text(
        "base: m3i:transfer/demo/detection\n"
        "data: {resize: {kind: sides, shorter: [480, 800], longest: 1333}, test_side: 96}\n"
    )
    (folder / "own.yaml").write_text(f"base: sides.yaml\n{text}\n")
    return folder / "own.yaml"


def test_a_mapping_of_another_kind_replaces_the_one_below_it(tmp_path: Path):
    config = load_run(detection(tmp_path, "data: {resize: {kind: jitter, size: 128}}"))
    assert isinstance(config, Detection)
    assert config.data.resize == Jitter(kind="jitter", size=128)
    assert config.data.test_side == 96


def test_a_mapping_of_the_same_kind_is_merged(tmp_path: Path):
    config = load_run(detection(tmp_path, "data: {resize: {kind: sides, longest: 2000}}"))
    assert isinstance(config, Detection)
    assert config.data.resize == Sides(kind="sides", shorter=(480, 800), longest=2000)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "data: {resize: {kind: jitter, shorter: [480]}}",
            "own.yaml:2: unknown key 'data.resize.shorter' of kind: jitter; valid keys are kind",
        ),
        ("data: {resize: {kind: jitter, sise: 5}}", "of kind: jitter; did you mean 'size'?"),
        (
            "data: {resize: {kind: sides, longest: many}}",
            "own.yaml:2: data.resize.longest: Input should be a valid integer",
        ),
        (
            "data: {resize: {kind: crop}}",
            "data.resize: write kind: jitter or kind: sides (got {'kind': 'crop'})",
        ),
        ("model: {head: {kind: yolo}}", "model.head: write kind: mask_rcnn or kind: dino"),
    ],
)
def test_what_is_wrong_in_one_of_several_kinds_is_one_sentence(
    tmp_path: Path, text: str, words: str
):
    with pytest.raises(ConfigError) as caught:
        load_run(detection(tmp_path, text))
    assert words in str(caught.value)


def test_every_key_that_chooses_a_kind_is_known_to_the_layers():
    def discriminators(node: type[Node]) -> Iterator[object]:
        for field in node.model_fields.values():
            if field.discriminator is not None:
                yield field.discriminator
            for below in nodes_in(field.annotation):
                yield from discriminators(below)

    found = {key for tree in TASKS.values() for key in discriminators(tree)}
    assert found == set(CHOOSING)
