import io
import pickle
import time
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from m3i_scale.models.intern_image import InternImage
from m3i_scale.models.weights import hub_name, load_published, load_weights

SMALL = {"channels": 16, "depths": [1, 1, 1, 1], "groups": [1, 2, 4, 8]}


@pytest.fixture(scope="module")
def published():
    torch.manual_seed(0)
    return InternImage(**SMALL, num_classes=5)


@pytest.mark.parametrize(
    "wrap", [lambda s: {"model": s, "epoch": 3}, lambda s: {"module": s}, dict]
)
def test_pth_files(published, tmp_path, wrap):
    state = published.state_dict()
    torch.save(wrap(state), tmp_path / "weights.pth")
    assert_same(load_published(tmp_path / "weights.pth"), state)


def test_hub_files(published, tmp_path):
    state = published.state_dict()
    save_file({f"model.{k}": v for k, v in state.items()}, tmp_path / "model.safetensors")
    assert_same(load_published(str(tmp_path / "model.safetensors")), state)
    torch.save({f"model.{k}": v for k, v in state.items()}, tmp_path / "pytorch_model.bin")
    assert_same(load_published(tmp_path / "pytorch_model.bin"), state)


def test_hub_names_of_the_layer_scale(tmp_path):
    model = InternImage(**SMALL, num_classes=5, layer_scale=1e-5, post_norm=True)
    state = model.state_dict()
    named = {hub_name(name): value for name, value in state.items()}
    assert "model.levels.0.blocks.0.layer_scale2" in named
    assert not any("gamma" in name for name in named)
    save_file(named, tmp_path / "model.safetensors")
    loaded = load_published(tmp_path / "model.safetensors")
    assert_same(loaded, state)
    assert load_weights(model, loaded) == []


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_loaded_weights_give_the_same_outputs(published, tmp_path):
    torch.save({"model": published.state_dict()}, tmp_path / "weights.pth")
    other = InternImage(**SMALL, num_classes=5)
    assert load_weights(other, load_published(tmp_path / "weights.pth")) == []
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(other.eval()(image), published.eval()(image))


def test_another_number_of_classes(published):
    other = InternImage(**SMALL, num_classes=7)
    before = other.head.weight.clone()
    with pytest.raises(
        ValueError, match=r"2 of another shape: head.weight \(5, 192\) for \(7, 192\)"
    ):
        load_weights(other, published.state_dict())
    kept = load_weights(other, published.state_dict(), fresh=("head",))
    assert kept == ["head.weight", "head.bias"]
    assert torch.equal(other.head.weight, before)
    assert torch.equal(other.conv_head[0].weight, published.conv_head[0].weight)


def test_from_classifier_to_pretraining(published):
    other = InternImage(
        **SMALL, use_clip_projector=True, clip_projector_width=32, clip_heads=4, num_classes=0
    )
    fresh = ("conv_head", "head", "dcnv3_head_x3", "dcnv3_head_x4", "clip_projector")
    kept = load_weights(other, published.state_dict(), fresh=fresh)
    assert kept
    assert all(name.startswith(fresh) for name in kept)
    assert torch.equal(other.patch_embed.conv1.weight, published.patch_embed.conv1.weight)


def test_names_that_do_not_fit_are_listed_and_nothing_is_copied(published):
    other = InternImage(**SMALL, num_classes=5)
    before = other.head.bias.clone()
    state = {k: v + 1 for k, v in published.state_dict().items() if k != "head.weight"}
    state["neck.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"1 missing: head.weight; 1 unexpected: neck.weight"):
        load_weights(other, state)
    assert torch.equal(other.head.bias, before)


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_files_with_code_are_refused(tmp_path, capsys):
    torch.save({"model": {}, "config": Payload()}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model": Payload()}, protocol=2))
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(ValueError, match="cannot be read as plain tensors") as refused:
            load_published(tmp_path / name)
        assert "weights_only" not in str(refused.value)  # how to run the code after all
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.pth", None, "no such file"),
        ("broken.pth", b"broken", "cannot be read"),
        ("broken.safetensors", b"broken", "not a safetensors file"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_published(tmp_path / name)


def test_a_file_without_weights(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        load_published(tmp_path / "empty.pth")


def test_an_archive_that_unpacks_to_far_more_is_refused_unread(tmp_path):
    plain, packed = tmp_path / "plain.pth", tmp_path / "packed.pth"
    torch.save({"a": torch.zeros(1_000_000)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    assert load_published(plain)["a"].numel() == 1_000_000
    with pytest.raises(ValueError, match="unpacks to 4,"):
        load_published(packed)


@pytest.mark.parametrize("key", [1, ("a", "b"), None])
def test_names_that_are_none(tmp_path, key):
    torch.save({key: torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="no state dict"):
        load_published(tmp_path / "weights.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_class_with_an_endless_name_takes_no_time(tmp_path, legacy):
    path, buffer = tmp_path / "weights.pth", io.BytesIO()
    torch.save({"a": torch.zeros(9)}, path, _use_new_zipfile_serialization=not legacy)
    name = b"ctorch" + bytes(199_999) + b"\xff\nFloatStorage"
    if legacy:
        path.write_bytes(path.read_bytes().replace(b"ctorch\nFloatStorage", name))
    else:
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w") as new:
            for info in old.infolist():
                content = old.read(info).replace(b"ctorch\nFloatStorage", name)
                new.writestr(info.filename, content)
        path.write_bytes(buffer.getvalue())
    begun = time.process_time()
    with pytest.raises(ValueError, match="names a class of 200,0"):
        load_published(path)
    assert time.process_time() - begun < 20
