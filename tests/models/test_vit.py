import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from m3i_scale.models.positions import grid_embedding
from m3i_scale.models.vit import ViT

TINY = {
    "width": 32,
    "depth": 2,
    "heads": 4,
    "patch_size": 8,
    "pool_heads": 4,
    "embed_dim": 24,
}


def test_features_are_those_of_timm_with_the_same_weights():
    model = ViT(**TINY).eval()
    reference = VisionTransformer(
        img_size=(32, 48),
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=4,
        num_classes=0,
        class_token=False,
        global_pool="",
    ).eval()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("attention_pool.")}
    state["pos_embed"] = grid_embedding((4, 6), 32)[None]
    reference.load_state_dict(state)
    images = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(model.features(images), reference.forward_features(images))


def test_base_size():
    with torch.device("meta"):
        model = ViT()
    encoder = sum(p.numel() for n, p in model.named_parameters() if "attention_pool" not in n)
    assert encoder == 85_798_656 - 197 * 768 - 768  # timm's, less positions and class token
    assert (model.width, model.embed_dim, model.stride) == (768, 768, 16)
    assert model.grid_size(224, 192) == (14, 12)


def test_every_parameter_gets_a_gradient_and_checkpointing_changes_none():
    grads = []
    for checkpoint_blocks in (False, True):
        torch.manual_seed(0)
        model = ViT(**TINY, drop_path_rate=0.3, checkpoint_blocks=checkpoint_blocks)
        torch.manual_seed(1)
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None for grad in grads[0].values())
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_initialisation():
    weight = ViT(**TINY).blocks[0].mlp.fc1.weight
    assert weight.std().item() == pytest.approx((2 / sum(weight.shape)) ** 0.5, rel=0.05)


def test_bad_sizes():
    with pytest.raises(ValueError, match=r"width=32.*heads=5"):
        ViT(**{**TINY, "heads": 5})
    with pytest.raises(ValueError, match=r"image width=36.*patch size=8"):
        ViT(**TINY).features(torch.zeros(1, 3, 32, 36))


def test_positions_are_those_of_training_at_any_size():
    trained = ViT(**TINY, position_grid=4).eval()
    plain = ViT(**TINY).eval()
    plain.load_state_dict(trained.state_dict())
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(trained.features(images), plain.features(images))
    # At twice the size the centres of 2 x 2 patches are where one patch was.
    finer = grid_embedding((8, 8), 32, trained_side=4)
    y = (torch.arange(8) + 0.5) / 2 - 0.5
    angle = y[:, None] * 10000.0 ** -(torch.arange(8) / 8)
    expected = torch.cat([angle.sin(), angle.cos()], 1)  # (8, 16), of rows
    torch.testing.assert_close(finer[::8, :16], expected)
    torch.testing.assert_close(finer[:8, 16:], expected)
    assert not torch.allclose(trained.features(torch.zeros(1, 3, 64, 64)),
                              plain.features(torch.zeros(1, 3, 64, 64)))  # fmt: skip
    with pytest.raises(ValueError, match="position_grid=0"):
        ViT(**TINY, position_grid=0)


def test_features_after_blocks():
    model = ViT(**TINY).eval()
    images = torch.randn(2, 3, 32, 32)
    first, last = model.features_after(images, [0, 1])
    torch.testing.assert_close(model.norm(model.blocks[1](first)), last)
    assert torch.equal(model.features(images), last)
    with pytest.raises(ValueError, match="this ViT has 0 to 1"):
        model.features_after(images, [2])
