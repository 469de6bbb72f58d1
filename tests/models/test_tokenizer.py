import json
import pickle

import pytest
import torch

from m3i_scale.models.tokenizer import load_tokenizer, train_wordpiece

CAPTIONS = [
    "Greek small letter alpha, serif bold",
    "Greek small letter omega, sans-serif",
    "Latin capital letter A, serif",
] * 5


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tokenizer.json"


@pytest.fixture
def tokenizer(path):
    return train_wordpiece(CAPTIONS, 120, path)


def test_captions_come_back(tokenizer):
    ids, mask = tokenizer(["Greek capital LETTER alpha", ""], 16)
    assert ids.shape == mask.shape == (2, 16)
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)
    assert tokenizer.decode(ids[0].tolist()) == "greek capital letter alpha"
    assert mask[1].tolist() == [True] * 2 + [False] * 14
    assert (ids[~mask] == tokenizer.pad_id).all()
    assert ids.max() < tokenizer.vocab_size <= 120


def test_special_tokens_survive_truncation(tokenizer):
    empty, _ = tokenizer([""], 2)
    ids, mask = tokenizer(["Greek small letter alpha, serif bold"], 4)
    assert ids[0, [0, -1]].tolist() == empty[0].tolist()
    assert mask.all()
    assert tokenizer(["alpha"], 9)[0].shape == (1, 9)


def test_loading_from_file_and_folder(tokenizer, path):
    expected = tokenizer(CAPTIONS[:3], 12)
    for place in (path, str(path), path.parent):
        for actual, wanted in zip(load_tokenizer(place)(CAPTIONS[:3], 12), expected, strict=True):
            assert torch.equal(actual, wanted)
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]


def test_training_is_reproducible(tokenizer, path):
    first = path.read_bytes()
    train_wordpiece(CAPTIONS, 120, path)
    assert path.read_bytes() == first


def test_it_travels_to_workers(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301
    assert torch.equal(copy(CAPTIONS, 12)[0], tokenizer(CAPTIONS, 12)[0])


def test_no_texts(tokenizer):
    ids, mask = tokenizer([], 5)
    assert ids.shape == mask.shape == (0, 5)


def edited(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_bad_tokenizers(tokenizer, path):
    with pytest.raises(ValueError, match=r"no tokenizer at .*missing\.json.*model\.text: null"):
        load_tokenizer(path.with_name("missing.json"))
    with pytest.raises(ValueError, match="adds no start token"):
        load_tokenizer(edited(path, post_processor=None))
    path.write_text(path.read_text().replace("[PAD]", "[HOLE]"))
    with pytest.raises(ValueError, match="no padding token"):
        load_tokenizer(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_tokenizer(path)


def test_bad_lengths(tokenizer, path):
    with pytest.raises(ValueError, match=r"max_length=1.*at least 2"):
        tokenizer(["alpha"], 1)
    with pytest.raises(ValueError, match=r"vocab_size=4: must be at least \d\d"):
        train_wordpiece(CAPTIONS, 4, path)
