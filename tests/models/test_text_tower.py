import pytest
import torch
from transformers import BertConfig, BertModel

from m3i_scale import config
from m3i_scale.models.text_tower import TextTower

TINY = {"embed_dim": 10, "width": 32, "depth": 2, "heads": 4, "ffn": 64, "max_length": 12}


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return TextTower(50, **TINY)


@pytest.fixture
def batch():
    tokens = torch.randint(4, 50, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(8) < torch.tensor([8, 5, 2])[:, None]
    return tokens, mask


def test_it_is_bert_with_a_projection(tower, batch):
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=12,
        attn_implementation="eager",
    )
    bert = BertModel(config, add_pooling_layer=False).eval()
    bert.load_state_dict(tower.bert.state_dict())
    tokens, mask = batch
    first = bert(input_ids=tokens, attention_mask=mask.long()).last_hidden_state[:, 0]
    expected = first @ tower.projection.weight.T
    torch.testing.assert_close(tower(tokens, mask), expected, atol=1e-6, rtol=1e-5)


def test_default_is_bert_base():
    shape = config.TextTower(tokenizer="any", max_length=512)
    with torch.device("meta"):
        tower = TextTower(**shape.model_dump(exclude={"tokenizer"}))
    # BERT-Base has 109,482,240 parameters, 590,592 of them in the pooler left out here.
    assert sum(p.numel() for p in tower.bert.parameters()) == 109_482_240 - 590_592


def test_padding_changes_nothing(tower, batch):
    tokens, mask = batch
    out = tower(tokens, mask)
    torch.testing.assert_close(tower(tokens.masked_fill(~mask, 0), mask), out)
    torch.testing.assert_close(tower(tokens[1:2, :5], mask[1:2, :5])[0], out[1])


def test_initialisation(tower):
    embedding = tower.bert.embeddings.word_embeddings.weight
    assert embedding.std().item() == pytest.approx(0.02, rel=0.1)
    dense = tower.bert.encoder.layer[0].intermediate.dense.weight
    assert dense.std().item() == pytest.approx((2 / sum(dense.shape)) ** 0.5, rel=0.1)


def test_gradients_reach_every_parameter_and_checkpointing_changes_none(batch):
    grads = []
    for checkpoint_blocks in (False, True):
        torch.manual_seed(0)
        tower = TextTower(50, **TINY, checkpoint_blocks=checkpoint_blocks)
        tower(*batch).square().sum().backward()
        grads.append({name: p.grad for name, p in tower.named_parameters()})
    assert all(grad is not None for grad in grads[0].values())
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_bfloat16(tower, batch):
    expected = tower(*batch)
    actual = tower.bfloat16()(*batch)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, atol=0.02, rtol=0.05)


def test_bad_input(tower):
    with pytest.raises(ValueError, match=r"13 tokens.*at most 12"):
        tower(torch.zeros(1, 13, dtype=torch.int64), torch.ones(1, 13, dtype=torch.bool))
    with pytest.raises(ValueError, match="pad_id=50"):
        TextTower(50, **TINY, pad_id=50)
