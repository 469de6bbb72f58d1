import pytest
import torch

from helpers.run_folder import networks
from helpers.shards import caption, write_images
from m3i_scale.models.tokenizer import load_tokenizer
from m3i_scale.transfer import features
from m3i_scale.transfer.features import Pixels, encode_captions, encode_images, encode_sources


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


def test_pixels_are_normalised_by_channel():
    pixels = Pixels(4, (0.5, 0.25, 0.0), (0.5, 0.25, 2.0))
    images = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    prepared = pixels.prepare(images, torch.device("cpu"))
    assert prepared.shape == (2, 3, 4, 4)
    assert prepared.is_contiguous(memory_format=torch.channels_last)
    for c in range(3):
        wanted = (images[..., c] / 255 - pixels.mean[c]) / pixels.std[c]
        torch.testing.assert_close(prepared[:, c], wanted)


@torch.no_grad()
def test_a_whole_image_is_encoded_as_the_objective_predicts_from_all_tokens(made):
    images = torch.randn(3, 3, 64, 64)
    encoded = encode_images(made, images)
    tokens = made.student.backbone.features(images)
    seen = torch.ones(tokens.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(
        encoded.text,
        made.predict_text(made.student.backbone.pool(tokens, seen)),
        rtol=1e-5,
        atol=1e-6,
    )
    pooled = made.student.backbone.pool(tokens)
    torch.testing.assert_close(encoded.pooled, pooled)
    torch.testing.assert_close(encoded.category, made.category_head(pooled))


@torch.no_grad()
def test_where_nothing_trains_the_pooling_the_mean_token_is_the_feature(config, made):
    dense = [t for t in config.objective.targets if t.dense]
    objective = config.objective.model_copy(update={"targets": dense, "balance": None})
    plain = networks(config.model_copy(update={"objective": objective}), seed=0)
    images = torch.randn(2, 3, 64, 64)
    encoded = encode_images(plain, images)
    torch.testing.assert_close(encoded.pooled, plain.student.backbone.features(images).mean(1))
    assert encoded.text is None
    assert encoded.category is None


@torch.no_grad()
def test_captions_keep_their_order_and_their_padding_does_not_count(config, made):
    tokenizer = load_tokenizer(config.model.text.tokenizer)
    captions = ["thing a", "thing b, style 3", "thing", "thing f, style"]
    embedded = encode_captions(made, tokenizer, captions, max_length=8, batch=2)
    whole = made.text_tower(*tokenizer(captions, 8))
    whole = whole / whole.norm(dim=1, keepdim=True)
    torch.testing.assert_close(embedded, whole, rtol=1e-4, atol=1e-5)


def test_one_pass_over_several_sources(folder, config, made):
    paths = [
        write_images(folder, "first", range(7), "text"),
        write_images(folder, "second", range(20, 25), "category"),
    ]
    sources = [features.open_source(path) for path in paths]
    assert [opened.source.kind for opened in sources] == ["text", "category"]
    pixels = Pixels.of(config.data)
    both = {"one": made, "other": networks(config, seed=1)}
    known, encoded = encode_sources(both, sources, pixels, batch=5)
    assert known.captions == [caption(n) for n in range(7)] + [""] * 5
    assert known.category.tolist() == [-1] * 7 + [n % 5 for n in range(20, 25)]
    for n in (0, 6, 11):
        image = features.read_image(known.places[n], 64)
        for name, model in both.items():
            alone = encode_images(model, pixels.prepare(image[None], torch.device("cpu")))
            torch.testing.assert_close(encoded[name].text[n], alone.text[0], rtol=1e-4, atol=1e-5)
    limited, _ = encode_sources(both, sources, pixels, limit=3)
    assert len(limited) == 6


def test_images_that_cannot_be_read_are_left_out_and_places_stay_right(folder, config, made):
    index = write_images(folder, "damaged", range(4), "text")
    tar = (folder / "damaged.tar").read_bytes()
    second = tar.index(b"\xff\xd8\xff", tar.index(b"00001.jpg"))
    (folder / "damaged.tar").write_bytes(tar[:second] + b"\0" * 400 + tar[second + 400 :])
    source = features.open_source(index)
    known, encoded = encode_sources({"one": made}, [source], Pixels.of(config.data))
    assert known.captions == [caption(n) for n in (0, 2, 3)]
    assert [place.number for place in known.places] == [0, 2, 3]
    assert len(encoded["one"].pooled) == 3


def test_missing_index(tmp_path):
    with pytest.raises(ValueError, match=r"there is no index .*nowhere\.parquet"):
        features.open_source(str(tmp_path / "nowhere.parquet"))
