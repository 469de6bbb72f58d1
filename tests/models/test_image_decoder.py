import pytest
import torch

from m3i_scale.models.image_decoder import ImageDecoder
from m3i_scale.models.positions import grid_positions, position_embedding

SIZES = {"out_width": 6, "width": 32, "depth": 2, "heads": 4, "ffn": 50, "head": "xavier"}


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    decoder = ImageDecoder(12, **SIZES)
    with torch.no_grad():
        for p in decoder.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return decoder


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    own = grid_positions((3, 4)).expand(2, -1, -1)[:, :7]
    targets = torch.randn(2, 5, 4, generator=generator)
    return torch.randn(2, 7, 12, generator=generator), own, targets


def test_it_is_a_pre_norm_transformer_over_visible_and_mask_tokens(decoder, inputs):
    visible, own, targets = inputs
    tokens = decoder.embed(visible) + decoder.position(position_embedding(own, 32))
    masked = decoder.mask_token + decoder.position(position_embedding(targets, 32))
    x = torch.cat([tokens, masked], 1)
    for block in decoder.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).view(2, 12, 3, 4, 8).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
        x = x + block.attn.proj(attention.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(decoder(*inputs), decoder.head(decoder.norm(x))[:, 7:])


def test_sizes_are_exact(decoder, inputs):
    assert decoder.blocks[0].mlp.fc1.out_features == 50
    assert decoder(*inputs).shape == (2, 5, 6)


def test_targets_depend_on_their_own_position(decoder, inputs):
    visible, own, targets = inputs
    order = torch.randperm(5)
    out = decoder(visible, own, targets)
    torch.testing.assert_close(decoder(visible, own, targets[:, order]), out[:, order])
    assert (out[:, 0] - out[:, 1]).abs().max() > 1e-3


def test_visible_tokens_are_a_set_with_positions(decoder, inputs):
    visible, own, targets = inputs
    order = torch.randperm(7)
    out = decoder(visible, own, targets)
    torch.testing.assert_close(decoder(visible[:, order], own[:, order], targets), out)
    assert (decoder(visible[:, order], own, targets) - out).abs().max() > 1e-4


def test_tokens_not_kept_are_ignored(decoder, inputs):
    visible, own, targets = inputs
    keep = torch.tensor([[True] * 4 + [False] * 3]).expand(2, -1)
    torch.testing.assert_close(
        decoder(visible, own, targets, keep), decoder(visible[:, :4], own[:, :4], targets)
    )


@pytest.mark.parametrize("keep", [None, torch.ones(2, 7, dtype=torch.bool)])
def test_checkpointing_and_gradients(inputs, keep):
    grads = []
    for checkpoint_blocks in (False, True):
        torch.manual_seed(0)
        decoder = ImageDecoder(12, **SIZES, checkpoint_blocks=checkpoint_blocks)
        decoder(*inputs, keep).square().sum().backward()
        grads.append({name: p.grad for name, p in decoder.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert all(grad.any() for grad in grads[0].values())


def test_bfloat16(decoder, inputs):
    visible, own, targets = inputs
    expected = decoder(*inputs)
    actual = decoder.bfloat16()(visible.bfloat16(), own, targets)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, atol=0.1, rtol=0.1)


def test_bad_sizes():
    with pytest.raises(ValueError, match=r"width=30.*heads=4"):
        ImageDecoder(12, **SIZES | {"width": 30})
    with pytest.raises(ValueError, match=r"width=30.*position embedding=4"):
        ImageDecoder(12, **SIZES | {"width": 30, "heads": 3})
