"""The plans of what a backbone is transferred to: against real ranks, and of every recipe."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from helpers.classification import draw_images, small_classification
from helpers.coco import content, small_detection, write
from helpers.measured import Allocations, require_state
from helpers.ranks import run_ranks
from helpers.segmentation import MASK2FORMER, draw_squares, small_segmentation
from m3i_scale import cli
from m3i_scale.cluster.launch import World
from m3i_scale.config.transfer import TransferRun
from m3i_scale.engine import loop, session
from m3i_scale.engine.memory import held_memory
from m3i_scale.planner.dry_run import describe
from m3i_scale.planner.estimate import Cluster, Plan, make_plan
from m3i_scale.planner.gpus import gpu
from m3i_scale.tasks import task_of
from m3i_scale.tasks.transfer import TransferTask

RANKS = 2
RECIPES = Path(__file__).parents[2] / "configs" / "transfer"

BATCH = {
    "optimizer.global_batch_size": 8, "optimizer.max_micro_batch": 2,
    "optimizer.duration": "8 steps", "engine.precision": "bf16",
    "engine.zero.reduce_bucket": 150_000,
}  # fmt: skip
# Training images of 64 x 64 pixels, all of them, whose objects divide the noised ones.
SIZED = {"data.resize": {"kind": "jitter", "size": 64, "scale": [2.0, 2.0]}}
INTERN_IMAGE = {
    "channels": 16, "depths": [1, 1, 2, 1], "groups": [1, 2, 4, 8], "checkpoint_blocks": True,
}  # fmt: skip

Make = Callable[[Path, Path], TransferRun]


def _case(make: Callable[..., TransferRun], *words: str, **changes: Any) -> Make:
    """A configuration of images and run folder; in `changes`, `__` stands for a dot."""
    overrides = BATCH | {key.replace("__", "."): value for key, value in changes.items()}

    def made(folder: Path, runs: Path) -> TransferRun:
        return make(folder, runs, *words, overrides)

    return made


CASES: dict[str, Make] = {
    "fine-tuning": _case(
        small_classification, engine__zero__stage=3, model__pooling="attention",
        model__backbone__options__checkpoint_blocks=True,
        engine__zero__persistence_threshold=2_000,
    ),
    "probe": _case(
        small_classification, engine__zero__stage=1, model__frozen=True,
        optimizer__layer_decay=1.0, optimizer__average=None, engine__precision="fp32",
    ),
    "mask_rcnn": _case(small_detection, "vit", engine__zero__stage=1, **SIZED),
    "dino": _case(
        small_detection, "composite", engine__zero__stage=3, **SIZED,
        model__backbone__options=INTERN_IMAGE, model__head__checkpoint_layers=True,
        model__head__denoising=12, model__head__federated={"classes": 2},
        engine__zero__persistence_threshold=0,
    ),
    "upernet": _case(small_segmentation, engine__zero__stage=2, optimizer__average=0.9),
    "mask2former": _case(
        small_segmentation, engine__zero__stage=3, model__head=MASK2FORMER, data__crop=64
    ),
}  # fmt: skip
# Contents decide how many regions have masks and how many objects are noised.
TOLERANCE = {"mask_rcnn": 0.15, "dino": 0.15}


def draw(folder: Path) -> dict[str, Path]:
    """The data of all cases."""
    images, squares = draw_images(folder / "images"), draw_squares(folder / "squares")
    coco = write(folder / "coco", content(8)).parent
    return {
        "fine-tuning": images, "probe": images, "mask_rcnn": coco, "dino": coco,
        "upernet": squares, "mask2former": squares,
    }  # fmt: skip


def measure(world: World, folder: Path, data: dict[str, Path]) -> dict[str, Any]:
    """Of each case, bytes held after three steps, and at the turns to the backward pass."""
    found = {}
    for name, make in CASES.items():
        task = task_of(make(data[name], folder / name))
        stream = task.open_stream()
        with mock.patch.object(session, "_speed", return_value=None):
            run = session.open_run(
                task, world, stream, epoch_samples=stream.samples, resume="never",
                sources=stream.identities(),
            )  # fmt: skip
        batches = loop.open_batches(run)
        for _ in range(3):  # ZeRO-3 knows the order of modules from the third on
            loop.train_step(run, batches)
        held = held_memory(run.sharded)
        forward, turns = run.sharded.engine.forward, []

        def watched(
            inputs: Any, forward: Any = forward, turns: Any = turns, task: Any = task
        ) -> Any:
            with Allocations() as allocations:
                outputs = forward(inputs)
            turns.append(allocations.alive(0.3) + kept_images(task, inputs))
            return outputs

        run.sharded.engine.forward = watched
        loop.train_step(run, batches)
        found[name] = {"held": held, "turns": turns, "said": describe(run, stream.describe())}
    return found


def kept_images(task: Any, inputs: Any) -> int:
    """Bytes of images that were there before the forward pass, of which autograd keeps them.

    A detector normalises them inside; a frozen backbone keeps none.
    """
    apart = getattr(task.config.model, "frozen", False) or not inputs.images.is_floating_point()
    return 0 if apart else int(inputs.images.nbytes)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("plan")
    return run_ranks(RANKS, measure, folder, data=draw(folder))[0]


@functools.cache
def plan_of(name: str) -> Plan:
    config = CASES[name](Path("none"), Path("runs"))
    task = task_of(config)
    assert isinstance(task, TransferTask)
    return make_plan(config, task.trace(kernels=False), Cluster(gpu("h100"), 1, RANKS))


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_memory_is_what_ranks_hold(case: str, measured: dict[str, Any]):
    require_state(plan_of(case).state, measured[case]["held"])


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_what_waits_for_the_backward_pass_is_what_a_forward_pass_allocates(
    case: str, measured: dict[str, Any]
):
    plan = plan_of(case)
    waiting = plan.passing["activations"] + plan.waiting_parameters
    found = max(measured[case]["turns"])
    assert waiting == pytest.approx(found, rel=TOLERANCE.get(case, 0.1))


@pytest.mark.distributed
def test_a_dry_run_counts_the_same_kinds(measured: dict[str, Any]):
    for case, found in measured.items():
        lines = found["said"].splitlines()
        for kind, size in plan_of(case).state.items():
            line = f"  {kind:24s} {size / 2**30:12.3f} GiB"
            assert (line in lines) == bool(size), (case, kind)


def plan_text(recipe: str, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["plan", "--config", str(RECIPES / f"{recipe}.yaml"), *words]) == 0
    return capsys.readouterr().out


def recipes(*, huge: bool) -> list[str]:
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    return [name for name in names if name.endswith("_h") == huge]


@pytest.mark.parametrize("recipe", recipes(huge=False))
def test_every_recipe_has_a_plan_and_fits(recipe: str, capsys: pytest.CaptureFixture[str]):
    text = plan_text(recipe, capsys, "--samples", "118_000")
    assert "It fits: " in text
    assert "engine.zero.stage    GiB/GPU" in text
    for word in ("teacher", "averaged", "softmax", "first pass"):  # of pre-training
        assert word not in text


@pytest.mark.slow
def test_two_internimage_h_on_the_largest_images_fit(capsys: pytest.CaptureFixture[str]):
    assert "coco_internimage_h" in recipes(huge=True)  # all of which take as long
    text = plan_text("coco_internimage_h", capsys, "--nodes", "4", "--sweep", "8,32")
    assert "dino on 2 x intern_image_h, 1800 x 2000 pixels, 2,187.3 M parameters trained" in text
    assert "It fits: " in text
    parts = {line.split()[0] for line in text[text.index("FLOPs per") :].splitlines()[1:6]}
    assert parts == {"backbone", "neck", "encoder", "heads", "decoder"}


def test_names_what_makes_it_fit(capsys: pytest.CaptureFixture[str]):
    words = ["--samples", "118_000", "--gpu", "a100-40", "optimizer.max_micro_batch=64"]
    size = ["data.resize.size=2048", "optimizer.global_batch_size=512"]
    text = plan_text("coco_vitdet_b16", capsys, *words, *size)
    assert "does NOT fit" in text
    advice = text.split("What would fit: ")[1].split(";")[0].split(".\n")[0]
    text = plan_text("coco_vitdet_b16", capsys, *words, *size, *advice.split(", "))
    assert "It fits: " in text


@pytest.mark.parametrize(
    ("recipe", "words", "message"),
    [
        ("coco_vitdet_b16", ["data.resize.size=1000"], "must be a multiple of 32"),
        ("coco_vitdet_b16", ["model.head.kind=dino"], "needs the stages of an InternImage"),
        ("ade20k_upernet_vit_b16", ["data.crop=500"], "data.crop 500 is not a multiple of 32"),
        ("imagenet_finetune_vit_b16", ["data.image_size=225"], "image height"),
        ("imagenet_finetune_vit_b16", ["model.backbone.name=resnet50"], "resnet50"),
        ("imagenet_finetune_vit_b16", ["model.backbone.options={depht: 3}"], "depht"),
        ("imagenet_finetune_vit_b16", ["--nodes", "3"], "cannot be spread over 24 ranks"),
        ("imagenet_finetune_vit_b16", [], "--samples"),
    ],
)
def test_refuses_in_one_sentence(
    recipe: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    length = ["--samples", "1000"] if message != "--samples" else []
    assert cli.main(["plan", "--config", str(RECIPES / f"{recipe}.yaml"), *length, *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
