import pytest
import torch

from m3i_scale.models.backbone import Backbone, build_backbone

SMALL_INTERN_IMAGE = {
    "channels": 16,
    "depths": [1, 1, 1, 1],
    "groups": [1, 2, 4, 8],
    "clip_projector_width": 32,
    "clip_heads": 4,
    "clip_embed_dim": 20,
}
SMALL_VIT = {"width": 32, "depth": 1, "heads": 4, "pool_heads": 4, "embed_dim": 20}


@pytest.mark.parametrize(
    ("name", "options"), [("intern_image", SMALL_INTERN_IMAGE), ("vit", SMALL_VIT)]
)
def test_interface(name, options):
    backbone: Backbone = build_backbone(name, **options)
    assert isinstance(backbone.pooling, torch.nn.Module)
    rows, columns = backbone.grid_size(64, 96)
    tokens = backbone.features(torch.randn(2, 3, 64, 96))
    assert (rows * backbone.stride, columns * backbone.stride) == (64, 96)
    assert tokens.shape == (2, rows * columns, backbone.width)
    keep = torch.arange(rows * columns).expand(2, -1) % 2 == 0
    assert backbone.pool(tokens, keep).shape == (2, backbone.embed_dim)


@pytest.mark.parametrize("size", ["t", "s", "b", "l", "xl", "h", "g"])
def test_every_size_has_the_fused_map(size):
    with torch.device("meta"):
        backbone = build_backbone(f"intern_image_{size}", drop_path_type="uniform")
    assert (backbone.width, backbone.embed_dim, backbone.stride) == (1024, 768, 16)
    names = [name for name, _ in backbone.named_parameters()]
    assert not [n for n in names if n.startswith(("head", "fc_norm", "conv_head"))]


def test_options_override_the_name():
    with torch.device("meta"):
        backbone = build_backbone("vit_b16", depth=3, patch_size=32)
    assert (len(backbone.blocks), backbone.stride) == (3, 32)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("internimage_h", {}, "did you mean intern_image_h"),
        ("resnet", {}, r"'resnet': known are intern_image, .*vit_b16"),
        ("intern_image_t", {"drop_path": 0.1}, "'drop_path': did you mean drop_path_"),
        ("intern_image", {"channels": 16, "depths": [1] * 4}, "needs groups"),
    ],
)
def test_mistakes_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(name, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"width": "x"}, {"width": None}, {"depth": "x"}, {"depth": 2**31}, {"width": 10**12},
        {"embed_dim": -3}, {"depth": []}, {"mlp_ratio": float("inf")},
        {"mlp_ratio": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_no_network_has_end_in_a_sentence(options):
    with pytest.raises(ValueError, match="backbone vit"):
        build_backbone("vit", **{"width": 16, "depth": 1, "heads": 2, "pool_heads": 2} | options)
