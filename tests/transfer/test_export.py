import json
import struct
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m3i_scale.config import Config
from m3i_scale.models.backbone import build_backbone
from m3i_scale.models.intern_image import InternImage
from m3i_scale.transfer import tensor_file
from m3i_scale.transfer.export import export, load_backbone, read_metadata, size


@pytest.fixture(scope="module")
def reader(finished):
    return finished.reader(7)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_intern_image_takes_the_backbone_strictly(tmp_path, config, made, reader, which):
    path = tmp_path / "backbone.safetensors"
    export(reader, config, path, which=which)
    model = InternImage(**config.model.backbone.options, use_clip_projector=True, num_classes=0)
    model.load_state_dict(load_file(path), strict=True)
    source = made.student if which == "student" else made.teacher
    for name, tensor in source.backbone.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_file_describes_itself(tmp_path, config, made, reader):
    path = tmp_path / "backbone.safetensors"
    export(reader, config, path, dtype="bf16", which="teacher")
    metadata = read_metadata(path)
    assert Config.model_validate(json.loads(metadata["config"])) == config
    assert (metadata["which"], metadata["step"]) == ("teacher", "7")
    backbone = load_backbone(path).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        rounded = build_backbone("intern_image", **config.model.backbone.options).eval()
        rounded.load_state_dict(
            {n: p.bfloat16().float() for n, p in made.teacher.backbone.state_dict().items()}
        )
        torch.testing.assert_close(backbone.features(images), rounded.features(images))


def test_all_networks(tmp_path, config, made, reader):
    path = tmp_path / "all.safetensors"
    export(reader, config, path, part="all", which="teacher")
    tensors = load_file(path)
    student = {n: p for n, p in made.named_parameters() if not n.startswith("teacher.")}
    assert set(tensors) == set(student)
    for name, tensor in tensors.items():
        source = name.replace("student.", "teacher.", 1)
        assert torch.equal(tensor, dict(made.named_parameters())[source]), name
    with pytest.raises(ValueError, match="does not describe a backbone"):
        load_backbone(path)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_layout_of_the_file(tmp_path, config, reader, dtype):
    path = tmp_path / "file.safetensors"
    written = []
    export(reader, config, path, dtype=dtype, progress=written.append)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    del header["__metadata__"]
    end = 0
    for entry in header.values():
        start, stop = entry["data_offsets"]
        assert start == end
        end = stop
    assert length % 8 == 0
    assert len(content) == 8 + length + end
    assert sum(written) == end == size(reader, config, dtype=dtype)


class Watched:
    """A checkpoint without files that knows how many elements of it are alive at once."""

    path = Path("watched")
    state = {"step": 0}  # noqa: RUF012
    shapes = {  # noqa: RUF012
        "student.backbone.a": [3],
        "student.backbone.large": [50, 40],
        "student.backbone.empty": [0, 4],
        "student.backbone.scalar": [],
        "text_tower.b": [1000],
    }

    def __init__(self) -> None:
        self.alive = self.most = 0

    def slice(self, kind, name, start, stop):
        piece = torch.arange(start, stop, dtype=torch.float32)
        self.alive += stop - start
        self.most = max(self.most, self.alive)
        weakref.finalize(piece, self.free, stop - start)
        return piece

    def free(self, elements):
        self.alive -= elements

    def tensor(self, kind, name):
        raise AssertionError("a whole tensor was asked for")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_pieces_bound_memory_whatever_the_largest_tensor(tmp_path, config, monkeypatch, dtype):
    monkeypatch.setattr(tensor_file, "PIECE", 300)
    watched = Watched()
    path = tmp_path / "watched.safetensors"
    export(watched, config, path, dtype=dtype)
    assert 0 < watched.most <= 2 * 300  # the piece being written and the next one
    tensors = load_file(path)
    assert set(tensors) == {"a", "large", "empty", "scalar"}
    wanted = torch.arange(2000, dtype=torch.float32).reshape(50, 40)
    assert torch.equal(tensors["large"], wanted.to(tensors["large"].dtype))
    assert tensors["scalar"].shape == ()


def test_a_failure_leaves_nothing_behind_and_the_old_file_alone(tmp_path, config):
    class Failing(Watched):
        def slice(self, kind, name, start, stop):
            if name.endswith("large"):
                raise OSError("the disk is gone")
            return super().slice(kind, name, start, stop)

    path = tmp_path / "file.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="the disk is gone"):
        export(Failing(), config, path)
    assert [p.name for p in tmp_path.iterdir()] == ["file.safetensors"]
    assert path.read_bytes() == b"old"


def test_bad_input(tmp_path, config, reader):
    with pytest.raises(ValueError, match="there is no folder"):
        export(reader, config, tmp_path / "nowhere" / "x.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_backbone(tmp_path / "broken.safetensors")
