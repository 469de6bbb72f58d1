"""Exported folders: what other libraries load computes what the run's backbone computes."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
import yaml
from PIL import Image
from safetensors import safe_open
from torch import nn

from helpers.run_folder import captioned_config, networks, write_run
from helpers.shards import jpeg
from helpers.small import small_targets
from m3i_scale.cli import main
from m3i_scale.integrations import initial
from m3i_scale.models.backbone import build_backbone
from m3i_scale.models.dcn import DCNv3
from m3i_scale.transfer import onnx_file
from m3i_scale.transfer.export import load_backbone

VIT = {"name": "vit", "options": {"width": 32, "depth": 2, "heads": 4, "mlp_ratio": 3.0,
                                  "patch_size": 16, "pool_heads": 4, "embed_dim": 24,
                                  "position_grid": 3}}  # fmt: skip
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
HAS_ONNX = not [name for name in onnx_file.NEEDED if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="onnx, onnxscript or onnxruntime is missing")


class Run:
    """A finished run: its folder, and its networks."""

    def __init__(self, folder: Path, overrides: dict[str, Any] | None = None) -> None:
        folder.mkdir()
        images = {"data.mean": MEAN, "data.std": STD}
        self.config = captioned_config(folder, images | (overrides or {}))
        self.made = networks(self.config, seed=5)
        self.folder = write_run(self.config, self.made)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.made.student.backbone.features(pixels)

    def pooled(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.made.student.backbone.pool(tokens)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("vit") / "run", {"model.backbone": VIT})


@pytest.fixture(scope="module")
def intern(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("intern") / "run")


@pytest.fixture
def export(tmp_path):
    def run_command(run: Run, form: str, *more: str) -> Path:
        folder = tmp_path / form
        words = ["export", "--run", str(run.folder), "--format", form, "--out", str(folder)]
        assert main([*words, *more]) == 0
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        return folder

    return run_command


def run_card(folder: Path, monkeypatch) -> dict[str, Any]:
    """What the card's lines leave behind when they are run in the folder."""
    (block,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    (folder / "photo.jpg").write_bytes(jpeg(3))
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    with torch.no_grad():
        exec(block, names)
    return names


def pixels_of(processor) -> torch.Tensor:
    return processor(Image.open("photo.jpg"), return_tensors="pt").pixel_values


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_vit_in_timm(vit, export, monkeypatch):
    names = run_card(export(vit, "timm"), monkeypatch)
    model = names["model"]
    assert type(model).__name__ == "VisionTransformer"
    pixels = names["transform"](Image.open("photo.jpg").convert("RGB"))[None]
    assert pixels.shape == (1, 3, 64, 64)
    expected = vit.features(pixels)
    close(names["features"], expected)
    close(model(pixels), expected.mean(1))
    prepared = timm.data.resolve_model_data_config(model)
    assert [list(prepared[name]) for name in ("mean", "std")] == [MEAN, STD]
    assert (prepared["interpolation"], prepared["crop_pct"]) == ("bicubic", 1.0)


def test_vit_from_timm_with_a_classifier_at_another_size(vit, export):
    folder = export(vit, "timm")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7, img_size=96)
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 7)


def test_vit_in_transformers(vit, export, monkeypatch):
    names = run_card(export(vit, "transformers"), monkeypatch)
    assert type(names["model"]).__name__ == "IJepaModel"
    pixels = pixels_of(names["processor"])
    assert pixels.shape == (1, 3, 64, 64)
    close(names["output"].last_hidden_state, vit.features(pixels))


def test_nothing_is_missing_in_transformers(vit, export):
    folder = export(vit, "transformers", "--which", "teacher", "--dtype", "bf16")
    model, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    query = vit.made.teacher.backbone.blocks[1].attn.qkv.weight[:32].bfloat16()
    assert torch.equal(model.state_dict()["layers.1.attention.q_proj.weight"], query)
    classifier = transformers.AutoModelForImageClassification.from_pretrained(folder, num_labels=7)
    assert classifier.float()(torch.zeros(1, 3, 64, 64)).logits.shape == (1, 7)


def test_intern_image_in_timm(intern, export, monkeypatch):
    names = run_card(export(intern, "timm"), monkeypatch)
    model = names["model"]
    assert type(model).__name__ == "TimmInternImage"
    pixels = names["transform"](Image.open("photo.jpg").convert("RGB"))[None]
    tokens = intern.features(pixels)
    close(names["features"].flatten(2).transpose(1, 2), tokens)
    close(model(pixels), intern.pooled(tokens))
    prepared = timm.data.resolve_model_data_config(model)
    assert [list(prepared[name]) for name in ("mean", "std")] == [MEAN, STD]
    classifier = timm.create_model("local-dir:.", pretrained=True, num_classes=7)
    assert classifier(pixels).shape == (1, 7)


def test_intern_image_in_transformers(intern, export, monkeypatch):
    names = run_card(export(intern, "transformers"), monkeypatch)
    model, output = names["model"], names["output"]
    assert type(model).__name__ == "InternImageModel"
    tokens = intern.features(pixels_of(names["processor"]))
    close(output.last_hidden_state.flatten(2).transpose(1, 2), tokens)
    close(output.pooler_output, intern.pooled(tokens))
    _, report = type(model).from_pretrained(".", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    classifier = transformers.AutoModelForImageClassification.from_pretrained(".", num_labels=7)
    assert classifier(pixels_of(names["processor"])).logits.shape == (1, 7)


@pytest.mark.parametrize("form", ["timm", "transformers", "m3i"])
def test_a_pooling_that_was_not_trained(tmp_path, export, monkeypatch, form):
    dense = small_targets("image_i", "image_j")
    run = Run(tmp_path / "run", {"objective.targets": dense, "objective.balance": None})
    folder = export(run, form)
    assert "did not train the attention pooling" in (folder / "README.md").read_text()
    names = run_card(folder, monkeypatch)
    if form == "timm":
        pixels = names["transform"](Image.open("photo.jpg").convert("RGB"))[None]
        found = names["features"].flatten(2).transpose(1, 2)
    else:
        pixels = pixels_of(names["processor"])
        found = names["tokens"] if form == "m3i" else names["output"].last_hidden_state
        found = found if form == "m3i" else found.flatten(2).transpose(1, 2)
    close(found, run.features(pixels))


@pytest.mark.parametrize("name", ["vit", "intern"])
def test_our_own_format(name, export, monkeypatch, request):
    run = request.getfixturevalue(name)
    names = run_card(export(run, "m3i"), monkeypatch)
    pixels = pixels_of(names["processor"])
    assert torch.equal(names["tokens"], run.features(pixels))


@pytest.mark.parametrize("form", ["m3i", "timm", "transformers"])
@pytest.mark.parametrize("name", ["vit", "intern"])
def test_another_run_starts_from_it(name, form, export, request):
    run = request.getfixturevalue(name)
    model = run.config.model.model_copy(update={"init": str(export(run, form))})
    found = initial.open_initial(model)
    backbone = build_backbone(model.backbone.name, **model.backbone.options)
    initial.load(backbone, found)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        close(backbone.eval().features(pixels), run.features(pixels))
    assert not any("learned" in note for note in found.notes)


def test_images_are_prepared_as_in_the_evaluation(intern, export, monkeypatch):
    from m3i_scale.data.decode import decode_image
    from m3i_scale.data.sequential import central_square
    from m3i_scale.transfer.features import Pixels

    names = run_card(export(intern, "m3i"), monkeypatch)
    image = central_square(decode_image(jpeg(3)), 64)
    ours = Pixels.of(intern.config.data).prepare(image[None], torch.device("cpu"))
    assert (pixels_of(names["processor"]) - ours).abs().mean() < 0.02


@needs_onnx
def test_vit_in_onnx(vit, export, monkeypatch):
    names = run_card(export(vit, "onnx"), monkeypatch)
    pixels = pixels_of(names["processor"])
    tokens = vit.features(pixels)
    close(torch.from_numpy(names["tokens"]), tokens)
    close(torch.from_numpy(names["pooled"][0]), vit.pooled(tokens))


class Layer(nn.Module):
    """A layer of InternImage-H, other than T's in every respect, as a backbone without pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, stride=4)
        self.dcn = DCNv3(
            16, 4, dw_kernel_size=5, remove_center=True, center_feature_scale=True, offset_scale=2.0
        )

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.dcn(self.embed(images).permute(0, 2, 3, 1)).flatten(1, 2)


def intern_image_t() -> nn.Module:
    """InternImage-T in its widths, with one block in each stage."""
    return build_backbone("intern_image_t", depths=[1, 1, 1, 1])


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize(("build", "samplings"), [(intern_image_t, 4), (Layer, 1)])
def test_intern_image_in_onnx(tmp_path, build, samplings):
    import onnx
    import onnxruntime

    torch.manual_seed(6)
    backbone = build().eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))  # offsets begin at zero
    pooling = build is intern_image_t
    path = tmp_path / "model.onnx"
    assert onnx_file.write_onnx(backbone, path, 64, pooling=pooling) < 1e-5
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} == {""}  # standard operators
    assert sum(node.op_type == "GridSample" for node in graph.node) == samplings
    images = torch.randn(3, 3, 64, 64)
    tokens, *pooled = onnxruntime.InferenceSession(path).run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = backbone.features(images)
        torch.testing.assert_close(torch.from_numpy(tokens), expected, rtol=1e-4, atol=1e-4)
        for vector in pooled:
            close(torch.from_numpy(vector), backbone.pool(expected))
    assert len(pooled) == pooling


@needs_onnx
@pytest.mark.parametrize("difference", [1e-3, float("inf")])
def test_an_onnx_graph_that_differs_is_not_kept(vit, tmp_path, monkeypatch, capsys, difference):
    monkeypatch.setattr(onnx_file, "_save", lambda model, path, images: path.write_bytes(b"graph"))
    monkeypatch.setattr(onnx_file, "_difference", lambda *words: difference)
    words = ["export", "--run", str(vit.folder), "--format", "onnx", "--out", str(tmp_path / "o")]
    assert main(words) == 2
    assert "differs from torch" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_onnx_a_sentence_says_how_to_install_it(vit, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_file, "NEEDED", ("onnx", "no_such_package"))
    words = ["export", "--run", str(vit.folder), "--format", "onnx", "--out", str(tmp_path / "o")]
    assert main(words) == 2
    assert "pip install 'm3i-scale[onnx]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------- the model card


def evaluation(**changes: Any) -> str:
    row = {"task": "kNN thing", "trained": 0.915, "untrained": 0.2, "chance": 0.1}
    content = {
        "which": "student", "step": 7, "precision": "fp32", "rows": [row],
        "queries": {"images": 10}, "gallery": {"images": 16},
    }  # fmt: skip
    return json.dumps(content | changes)


def copy_of(run: Run, folder: Path) -> Run:
    other = object.__new__(Run)
    other.__dict__ = run.__dict__ | {"folder": Path(shutil.copytree(run.folder, folder / "copy"))}
    return other


def test_the_card_has_the_figures_of_these_weights(vit, export, tmp_path):
    run = copy_of(vit, tmp_path)
    (run.folder / "eval.json").write_text(evaluation())
    text = (export(run, "timm") / "README.md").read_text()
    assert "| kNN thing | 91.5 | 20.0 | 10.0 |" in text
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "timm"
    for words in ("student of step 7", "64 x 64 pixels", "0.5, 0.4, 0.3", "| texts | captions |"):
        assert words in text


def test_the_card_has_no_figures_of_other_weights(vit, export, tmp_path):
    run = copy_of(vit, tmp_path)
    (run.folder / "eval.json").write_text(evaluation(which="teacher"))
    text = (export(run, "m3i") / "README.md").read_text()
    assert "evaluated with the teacher of step 7" in text
    assert "91.5" not in text


@pytest.mark.parametrize("content", ["{", "[]", "{}", evaluation(rows=[{}]), evaluation(rows=3)])
def test_a_damaged_evaluation_is_named(vit, tmp_path, capsys, content):
    run = copy_of(vit, tmp_path)
    (run.folder / "eval.json").write_text(content)
    out = tmp_path / "out"
    assert main(["export", "--run", str(run.folder), "--format", "m3i", "--out", str(out)]) == 2
    assert "eval.json is not as `m3i eval` writes it" in capsys.readouterr().err
    assert not out.exists()


# ----------------------------------------------------------------------------------------- mistakes


def test_mistakes_are_one_sentence(vit, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("precious")
    mistakes = {
        "holds files already": ["--format", "timm", "--out", str(full)],
        "is a file; name a folder": ["--format", "m3i", "--out", str(full / "mine")],
        "writes a folder; name one": ["--format", "timm", "--out", "x.safetensors"],
        "--part all goes into one file": [
            "--format", "timm", "--part", "all", "--out", str(tmp_path / "x")],
        "ONNX files are written in fp32": [
            "--format", "onnx", "--dtype", "bf16", "--out", str(tmp_path / "x")],
        "or say with --format": ["--out", str(tmp_path / "x")],
    }  # fmt: skip
    for message, words in mistakes.items():
        assert main(["export", "--run", str(vit.folder), *words]) == 2, words
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (full / "mine").read_text() == "precious"


def test_what_opens_the_storage_is_not_passed_on(vit, tmp_path):
    from m3i_scale.engine.checkpoint import CheckpointReader
    from m3i_scale.transfer.export import export

    source = vit.config.data.sources[0]
    index = "https://me:secret@host/a.parquet?signature=secret"
    data = vit.config.data.model_copy(
        update={
            "sources": [source.model_copy(update={"index": index})],
            "storage": vit.config.data.storage.model_copy(
                update={"options": {"s3": {"secret": "secret"}}}
            ),
        }
    )
    reader = CheckpointReader(vit.folder / "checkpoints" / "step-00000007")
    path = tmp_path / "x.safetensors"
    export(reader, vit.config.model_copy(update={"data": data}), path)
    with safe_open(path, "pt") as file:
        text = json.dumps(file.metadata())
    assert "secret" not in text
    assert "https://host/a.parquet" in text
    load_backbone(path)
