import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from m3i_kernels import dcnv3

from m3i_scale.models.dcn import DCNv3
from m3i_scale.models.intern_image import INTERN_IMAGE_VARIANTS, InternImage, intern_image

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = json.loads((GOLDEN / "intern_image_tiny.json").read_text())
PUBLISHED = json.loads(gzip.decompress((GOLDEN / "intern_image_state_dicts.json.gz").read_bytes()))
STAGES = ("stage1", "stage2", "stage3", "stage4")
SMALL = {"channels": 16, "depths": [1, 1, 2, 1], "groups": [1, 2, 4, 8]}
PRETRAIN = {
    "use_clip_projector": True,
    "clip_projector_width": 32,
    "clip_heads": 4,
    "clip_embed_dim": 24,
    "num_classes": 0,
}


def draw(name, shape):
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def ruled_value(name, shape):
    """Weights of the golden models: a function of each parameter's name."""
    v = draw(name, shape)
    if len(shape) >= 2:
        return v / np.sqrt(np.prod(shape[1:]))
    if name.endswith("weight"):
        return 1 + 0.1 * v
    if name.rpartition(".")[2].startswith("gamma"):
        return 0.5 + 0.1 * v
    return 0.1 * v


def ruled_model(variant, dtype):
    model = InternImage(**TINY[variant]["config"]).to(dtype).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(np.asarray(ruled_value(name, tuple(p.shape)))))
    return model


def randomise(model, seed=0, std=0.1):
    """Offsets, masks and gates start at zero; give them values so that they take part."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * std)
    return model


@pytest.fixture(scope="module", params=[("float64", 1e-6), ("float32", 1e-4)], ids=lambda p: p[0])
def precision(request):
    return getattr(torch, request.param[0]), request.param[1]


@pytest.mark.parametrize("variant", ["tiny_t", "tiny_b", "tiny_h"])
def test_values_and_gradients_are_those_of_the_published_network(variant, precision):
    dtype, tolerance = precision
    expected = dict(np.load(GOLDEN / f"{variant}.npz"))
    model = ruled_model(variant, dtype)
    image = torch.from_numpy(draw(f"image:{variant}", (2, 3, 64, 64))).to(dtype).requires_grad_()
    logits = model(image)
    weight = torch.from_numpy(draw(f"grad:{variant}", tuple(logits.shape))).to(dtype)
    (logits * weight).sum().backward()
    with torch.no_grad():
        actual = dict(zip(STAGES, model.forward_stages(image), strict=True))
        if "embedding" in expected:
            actual["embedding"] = model.forward_embedding(image)
    actual |= {"logits": logits, "grad_image": image.grad}
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = np.abs(actual[name].detach().numpy() - value).max() / np.abs(value).max()
        assert error < tolerance, (name, error)
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert norms == pytest.approx(TINY[variant]["param_grad_norms"], rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_names_shapes_and_sizes(name):
    published = PUBLISHED[name]
    with torch.device("meta"):
        model = intern_image(name)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == published["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == published["params"]
    assert INTERN_IMAGE_VARIANTS[name]["drop_path_rate"] == published["drop_path_rate"]


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_variants_are_the_published_configurations(name):
    defaults = {"layer_scale": None, "offset_scale": 1.0, "mlp_ratio": 4.0, "post_norm": False}
    ours = defaults | dict(INTERN_IMAGE_VARIANTS[name])
    assert {k: ours[k] for k in PUBLISHED[name]["config"]} == PUBLISHED[name]["config"]


@pytest.mark.parametrize("style", [{}, {"post_norm": True, "layer_scale": 1e-5}])
def test_pretraining_model_leaves_no_parameter_without_gradient(style):
    model = randomise(InternImage(**SMALL, **PRETRAIN, **style))
    tokens = model.features(torch.randn(2, 3, 64, 96))
    assert tokens.shape == (2, 4 * 6, 32)
    assert model.pool(tokens).shape == (2, 24)
    (tokens.square().sum() + model.pool(tokens).square().sum()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_features_are_row_major_over_the_stride_16_grid():
    model = randomise(InternImage(**SMALL, **PRETRAIN)).eval()
    image = torch.randn(1, 3, 64, 96)
    x3, x4 = (x.permute(0, 3, 1, 2) for x in model.forward_stages(image)[2:])
    conv4 = model.dcnv3_head_x4[0]
    up = torch.nn.functional.pixel_shuffle(conv4(x4), 2)
    fused = (up + model.dcnv3_head_x3(x3))[0]  # (D, 4, 6)
    tokens = model.features(image)[0]
    rows, columns = model.grid_size(64, 96)
    assert (rows, columns) == (4, 6)
    for r in range(rows):
        for c in range(columns):
            torch.testing.assert_close(tokens[r * columns + c], fused[:, r, c])


def test_checkpointing_changes_no_gradient_with_drop_path():
    grads = []
    for checkpoint_blocks in (False, True):
        torch.manual_seed(0)
        model = InternImage(
            **SMALL,
            **PRETRAIN,
            drop_path_rate=0.5,
            drop_path_type="uniform",
            checkpoint_blocks=checkpoint_blocks,
        )
        torch.manual_seed(1)
        model.features(torch.randn(4, 3, 64, 64)).square().sum().backward()
        grads.append([p.grad for p in model.levels.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("schedule", "expected"), [("linear", [0, 0.1, 0.2, 0.3, 0.4]), ("uniform", [0.4] * 5)]
)
def test_drop_path_schedules(schedule, expected):
    model = InternImage(**SMALL, drop_path_rate=0.4, drop_path_type=schedule)
    rates = [block.drop_path.drop_prob for level in model.levels for block in level.blocks]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_initialisation(dtype):
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = InternImage(**SMALL, center_feature_scale=True, **PRETRAIN)
    finally:
        torch.set_default_dtype(default)
    block = model.levels[2].blocks[1]
    for layer in (block.dcn.offset, block.dcn.mask):
        assert not layer.weight.any()
        assert not layer.bias.any()
    fc1 = block.mlp.fc1.weight.detach().float()
    assert fc1.std().item() == pytest.approx(0.02, rel=0.05)
    assert fc1.abs().max() < 0.2
    limit = (6 / (64 + 64)) ** 0.5
    value = block.dcn.input_proj.weight.detach().float().abs().max().item()
    assert value == pytest.approx(limit, rel=0.02)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"groups": [3, 6, 12, 24]}, r"channels of stage 1=16.*groups\[0\]=3"),
        ({"depths": [1, 1, 1]}, "four numbers"),
        ({"res_post_norm": True, "post_norm": True}, "post_norm=False"),
        ({"level2_post_norm": True}, "level2_post_norm_block_ids=None"),
        ({"level2_post_norm": True, "level2_post_norm_block_ids": [2]}, "0 to 1"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0"),
        ({"drop_path_rate": 0.1, "drop_path_type": "cosine"}, "'linear' or 'uniform'"),
        ({"dw_kernel_size": 4}, "odd"),
        ({"use_clip_projector": True, "clip_heads": 5}, "width=1024.*heads=5"),
    ],
)
def test_bad_configurations(config, message):
    with pytest.raises(ValueError, match=message):
        InternImage(**{**SMALL, **config})


def test_bad_uses():
    with pytest.raises(ValueError, match="must be one of t, s, b, l, xl, h, g"):
        intern_image("m")
    model = InternImage(**SMALL, num_classes=0)
    with pytest.raises(ValueError, match="use_clip_projector=True"):
        model.features(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="no classifier"):
        model(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"image height=80.*32"):
        InternImage(**SMALL, **PRETRAIN).features(torch.zeros(1, 3, 80, 64))


def test_fused_offset_branch_is_the_same_function_of_the_same_parameters() -> None:
    torch.manual_seed(0)
    plain = DCNv3(8, 2, dw_kernel_size=5, center_feature_scale=True).double()
    fused = DCNv3(8, 2, dw_kernel_size=5, center_feature_scale=True, fused_offset_branch=True)
    state = {k: torch.randn_like(v) / 4 for k, v in plain.state_dict().items()}
    plain.load_state_dict(state)
    fused.double().load_state_dict(state)
    x = torch.randn(2, 5, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(fused(x), plain(x))
    gradients = [
        torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (plain, fused)
    ]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_half_blend_reaches_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def operator(*tensors: torch.Tensor, half_blend: bool, **options: Any) -> torch.Tensor:
        asked.append(half_blend)
        return dcnv3(*tensors, half_blend=half_blend, **options)

    monkeypatch.setattr("m3i_scale.models.dcn.dcnv3", operator)
    for chosen in (False, True):
        asked.clear()
        model = InternImage(**SMALL, num_classes=0, half_blend=chosen)
        model.forward_stages(torch.zeros(1, 3, 64, 64))
        assert asked == [chosen] * sum(SMALL["depths"])
