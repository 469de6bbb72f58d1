"""FLOPs against published figures, closed formulas, and what the objective says is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from m3i_kernels import active_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from helpers.small import small_config
from m3i_scale.models.intern_image import intern_image
from m3i_scale.profiling.counter import count_flops
from m3i_scale.profiling.flops import Flops, step_flops


def flops_of(overrides: dict[str, Any], tmp_path: Any) -> Flops:
    config = small_config(tmp_path, overrides)
    return step_flops(config.model, config.objective, config.data.image_size)


@pytest.mark.parametrize(
    ("name", "size", "giga"), [("t", 224, 5), ("b", 224, 16), ("h", 640, 1478)]
)
def test_intern_image_counts_as_published(name: str, size: int, giga: float):
    # arXiv 2211.05778, Tables 1 and 2 (multiply-adds, rounded)
    with torch.device("meta"), torch.no_grad():
        network, image = intern_image(name), torch.empty(1, 3, size, size)
        flops = count_flops(lambda: network(image))
    assert flops / 2e9 == pytest.approx(giga, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_attention_counts_by_its_shapes_whatever_kernel_computes_it(
    dtype: torch.dtype, masked: bool, device: str
):
    # Head widths and masks that different devices and releases give to different kernels.
    heads, wanted, given, width, out = 3, 7, 11, 20, 36
    with FakeTensorMode(), torch.device(device):
        q = torch.empty(2, heads, wanted, width, dtype=dtype)
        k, v = (torch.empty(2, heads, given, size, dtype=dtype) for size in (width, out))
        mask = torch.empty(2, 1, 1, given, dtype=torch.bool) if masked else None
        flops = count_flops(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    assert flops == 2 * 2 * heads * wanted * given * (width + out)


VIT = {"model.backbone": {"name": "vit", "options": {"width": 64, "depth": 2, "heads": 4}}}


def test_vit_counts_as_its_formula(tmp_path: Any):
    tokens, width, depth = (64 // 16) ** 2, 64, 2
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    patches = tokens * 3 * 16**2 * width
    backbone = flops_of(VIT, tmp_path).parts["backbone"]
    assert backbone.forward == 2 * (patches + depth * block)
    assert backbone.backward == 2 * backbone.forward


def test_decoder_and_text_tower_count_as_their_formulas(tmp_path: Any):
    parts = flops_of(VIT, tmp_path).parts
    visible, width, ffn = 8, 32, 64  # half of 16 tokens; image i asks for 8, image j for 16
    decoder = 0
    for wanted in (8, 16):
        length = visible + wanted
        block = length * (4 * width**2 + 2 * width * ffn) + 2 * length**2 * width
        positions = length * 2 * width * width
        decoder += visible * 64 * width + positions + block + wanted * width * 64
    assert parts["decoder"].forward == 2 * decoder
    length = 8
    block = length * (4 * 32**2 + 2 * 32 * 64) + 2 * length**2 * 32
    assert parts["text tower"].forward == 2 * (block + 32 * 16)


def test_momentum_encoder_sees_both_clean_views_and_has_no_backward(tmp_path: Any):
    flops = flops_of({}, tmp_path)
    backbone, teacher = flops.parts["backbone"], flops.parts["teacher"]
    assert teacher == (2 * backbone.forward, 0, 0)
    trained = flops.forward - teacher.forward
    assert flops.model == 3 * trained + teacher.forward
    assert flops.hardware == flops.model


def test_checkpointing_repeats_the_blocks_of_trained_networks(tmp_path: Any):
    plain = flops_of({}, tmp_path)
    everywhere = {
        "model.backbone.options.checkpoint_blocks": True,
        "model.text.checkpoint_blocks": True,
        "model.decoder.checkpoint_blocks": True,
    }
    repeated = flops_of(everywhere, tmp_path)
    assert repeated.model == plain.model
    for name in ("backbone", "decoder", "text tower"):
        part = repeated.parts[name]
        assert 0.5 * part.forward < part.recomputed < part.forward, name
    for name in ("teacher", "heads"):
        assert repeated.parts[name].recomputed == 0
    assert repeated.hardware - plain.model == sum(p.recomputed for p in repeated.parts.values())


def test_counting_leaves_the_process_as_it_was(tmp_path: Any):
    backend, state = active_backend(), torch.get_rng_state()
    flops_of({}, tmp_path)
    assert active_backend() == backend
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.empty(()).device.type == "cpu"
