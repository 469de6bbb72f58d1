"""Training steps by the Triton kernels: `engine.kernels: triton`, interpreted, and DCNv3's choice.

Channels, groups and image are such that DCNv3's maps are 8 x 8, 4 x 4, 2 x 2 and 1 x 1, with 32
channels in a group: the first two are for the matrix kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.small import LABELLED, random_batch, small_tree
from helpers.training import full_weights
from m3i_scale.cluster.launch import World
from m3i_scale.config import Config
from m3i_scale.data.batch import Batch
from m3i_scale.tasks.pretraining import Pretraining

pytestmark = pytest.mark.distributed

BACKBONE: dict[str, Any] = {
    "name": "intern_image",
    "options": {
        "channels": 32,
        "depths": [1, 1, 1, 1],
        "groups": [1, 2, 4, 8],
        "mlp_ratio": 1.0,
        "offset_scale": 1.0,
        "dw_kernel_size": 3,
        "center_feature_scale": True,
        "clip_projector_width": 32,
        "clip_heads": 4,
        "clip_embed_dim": 24,
    },
}
# Name, engine.kernels, `half_blend` of the backbone, whether there are matrix kernels.
WAYS = (
    ("reference", "reference", False, False),
    ("gather", "triton", True, False),
    ("matrix", "triton", False, True),
)


def steps_in_all_ways(world: World, folder: Path) -> dict[str, dict[str, Any]]:
    """What a step has come to by each way, and the choices it logged."""
    from helpers.interpreted import emulated_matrix_kernels, interpret

    interpret()
    from m3i_kernels import set_backend, set_dcnv3_algorithm
    from m3i_kernels.dcnv3 import choice, matrix_op

    lines: list[str] = []
    log = logging.getLogger("m3i_kernels.dcnv3.choice")
    log.addFilter(lambda record: bool(lines.append(record.getMessage())) or True)
    found = {}
    for way, kernels, half_blend, matrix in WAYS:
        lines.clear()
        set_dcnv3_algorithm("auto")
        set_backend(kernels)
        if matrix:
            emulated = emulated_matrix_kernels()
            matrix_op.kernels = lambda made=emulated: made  # type: ignore[assignment, misc]
            choice.capability_of = lambda _: (9, 0)
            choice.triton_version = lambda: (3, 8)
        found[way] = one_step(world, folder / way, kernels, half_blend) | {"lines": lines[:]}
    return found


class Batches:
    """Samples of 32 pixels."""

    epoch_samples = 64

    def loader(self, *, micro_batch: int, **_: Any) -> Iterator[Batch]:
        while True:
            yield random_batch(micro_batch, image_size=32)


def one_step(world: World, folder: Path, kernels: str, half_blend: bool) -> dict[str, Any]:
    """Loss, gradient norm and weights after one step in bfloat16 on images and categories."""
    from m3i_scale.engine import loop, session

    backbone = BACKBONE | {"options": BACKBONE["options"] | {"half_blend": half_blend}}
    overrides = {
        "folder": str(folder),
        "model.backbone": backbone,
        "engine.precision": "bf16",
        "engine.kernels": kernels,
        "optimizer.global_batch_size": 2,
        "optimizer.max_micro_batch": 2,
        "data.sources": [{"name": "classes", "index": "none", "kind": "category"}],
    }
    config = Config.model_validate(small_tree(LABELLED, overrides))
    with mock.patch.object(session, "_speed", return_value=None):
        run = session.open_run(
            Pretraining(config), world, Batches(), epoch_samples=64, resume="never"
        )
    values, updated = loop.train_step(run, loop.open_batches(run))
    assert updated
    figures = [float(values[name]) for name in ("loss/total", "gradient/all_parameters")]
    return {"figures": figures, "weights": full_weights(run)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = run_ranks(
        1, steps_in_all_ways, tmp_path_factory.mktemp("steps"), time_limit=480
    )[0]
    return result


def chosen(lines: list[str]) -> dict[str, str]:
    """What was logged, by the size of the map."""
    return {line.split()[2]: line.partition(": ")[2] for line in lines if "kernel (" in line}


@pytest.mark.parametrize("way", ["gather", "matrix"])
def test_a_step_is_that_of_the_reference(found: dict[str, dict[str, Any]], way: str) -> None:
    """In bfloat16, to its rounding: figures and the way that weights went."""
    ours, reference = found[way], found["reference"]
    print(way, ours["figures"], reference["figures"])
    assert ours["figures"] == pytest.approx(reference["figures"], rel=2e-2)
    for name, weight in reference["weights"].items():
        assert torch.isfinite(ours["weights"][name]).all(), name
        torch.testing.assert_close(ours["weights"][name], weight, rtol=2e-2, atol=2e-3)


def test_small_maps_go_to_the_matrix_kernels_and_others_to_the_gather_kernel(
    found: dict[str, dict[str, Any]],
) -> None:
    assert found["reference"]["lines"] == []
    matrix = chosen(found["matrix"]["lines"])
    assert matrix == {
        "8": "matrix kernel (the shape rule allows it)",
        "4": "matrix kernel (the shape rule allows it)",
        "2": "gather kernel (it needs 16 to 256 positions, not 2 x 2)",
        "1": "gather kernel (it needs 16 to 256 positions, not 1 x 1)",
    }
    gather = chosen(found["gather"]["lines"])
    assert gather.keys() == matrix.keys()
    assert "it needs an NVIDIA GPU" in gather["8"]
    assert "16 to 256 positions" in gather["2"]
    assert all(line.startswith("gather kernel") for line in gather.values())


def test_half_blend_of_the_configuration_reaches_the_kernel(
    found: dict[str, dict[str, Any]],
) -> None:
    lines = [line for line in found["gather"]["lines"] if "blends corners" in line]
    assert len(lines) == 4
    assert all("in half precision (as asked)" in line for line in lines)
