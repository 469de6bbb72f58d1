"""`model.init`: weights of every form, what fits and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

import m3i_scale.integrations.timm_models  # noqa: F401  (registers)
from helpers.published import IMAGES, STYLES, random_model, write_published, write_timm_config
from m3i_scale.config import ConfigError, Model
from m3i_scale.integrations import hf, initial
from m3i_scale.models.backbone import build_backbone
from m3i_scale.models.intern_image import InternImage
from m3i_scale.models.positions import grid_embedding
from m3i_scale.models.weights import hub_name

POOLING = {"clip_projector_width": 32, "clip_heads": 4, "clip_embed_dim": 24}


def spec(init: Path | str, name: str = "intern_image", **options: Any) -> Model:
    return Model.model_validate({"init": str(init), "backbone": {"name": name, "options": options}})


def started(model: Model) -> tuple[Any, initial.Initial]:
    """A backbone with the weights that `model.init` names."""
    found = initial.open_initial(model)
    backbone: Any = build_backbone(model.backbone.name, **model.backbone.options)
    initial.load(backbone, found)
    return backbone.eval(), found


def as_hub_folder(folder: Path, model: InternImage) -> Path:
    return folder


def as_pth_file(folder: Path, model: InternImage) -> Path:
    torch.save({"model": model.state_dict(), "epoch": 3}, folder / "published.pth")
    return folder / "published.pth"


def as_safetensors_file(folder: Path, model: InternImage) -> Path:
    return folder / "model.safetensors"


def as_saved_by_transformers(folder: Path, model: InternImage) -> Path:
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    loaded.save_pretrained(folder / "saved", max_shard_size="100KB")
    assert (folder / "saved" / "model.safetensors.index.json").is_file()
    return folder / "saved"


def as_timm_folder(folder: Path, model: InternImage) -> Path:
    style = STYLES["h" if model.use_clip_projector else "b"]
    (folder / "timm").mkdir()
    write_timm_config(folder / "timm", style, 5)
    save_file(model.state_dict(), folder / "timm" / "model.safetensors")
    return folder / "timm"


FORMS = (as_hub_folder, as_pth_file, as_safetensors_file, as_saved_by_transformers, as_timm_folder)


@pytest.mark.parametrize(
    ("style", "form"), [("t", as_hub_folder), *((s, form) for s in "bh" for form in FORMS)]
)
def test_published_weights_of_every_form(style: str, form: Any, tmp_path: Path):
    model = write_published(tmp_path, style)
    source = form(tmp_path, model)
    backbone, found = started(spec(source, **{**POOLING, **STYLES[style]}))
    with torch.no_grad():
        for a, b in zip(backbone.forward_stages(IMAGES), model.forward_stages(IMAGES), strict=True):
            assert torch.equal(a, b)
        if style == "h":
            assert torch.equal(backbone.features(IMAGES), model.features(IMAGES))
    fused = {"dcnv3_head_x3", "dcnv3_head_x4", "clip_projector"}
    assert {n.partition(".")[0] for n in found.new} == (set() if style == "h" else fused)
    classifier = {"fc_norm", "head"} if style == "h" else {"conv_head", "head"}
    assert {n.partition(".")[0] for n in found.left} == classifier
    report = "\n".join(found.lines())
    assert f"loaded {len(list(found.names))} tensors" in report
    assert ("new: " in report) == (style != "h")
    assert "head (2)" in report
    record = json.loads(json.dumps(found.record()))
    assert record["init"] == str(source)
    assert all(len(digest) == 64 for digest in record["sha256"].values())


@pytest.mark.parametrize("part", ["backbone", "all"])
def test_a_file_of_an_export(part: str, tmp_path: Path):
    model = random_model("h", num_classes=0)
    options = STYLES["h"] | {"drop_path_rate": 0.3}
    described = json.dumps({"name": "intern_image", "options": options})
    prefix = "student.backbone." if part == "all" else ""
    state = {f"{prefix}{name}": p.bfloat16() for name, p in model.state_dict().items()}
    if part == "all":
        state["text_tower.weight"] = torch.zeros(3)
    else:  # a run with dense targets only does not train the pooling
        state = {n: p for n, p in state.items() if not n.startswith("clip_projector")}
    save_file(state, tmp_path / "mine.safetensors", metadata={"backbone": described})
    backbone, found = started(spec(tmp_path / "mine.safetensors", **STYLES["h"]))
    for name in found.names:
        expected = model.state_dict()[name].bfloat16().float()
        assert torch.equal(backbone.state_dict()[name], expected), name
    assert bool(found.new) == (part == "backbone")
    with pytest.raises(
        ConfigError, match=r"offset_scale is 1.0 there and 2.0 in the configuration"
    ):
        initial.open_initial(
            spec(tmp_path / "mine.safetensors", **STYLES["h"] | {"offset_scale": 2.0})
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 32, "groups": [2, 4, 8, 16]}, r"another shape: .*patch.* \(8, 3, 3, 3\)"),
        ({"depths": [1, 1, 3, 1]}, r"missing: levels.2.blocks.2"),
        ({"depths": [1, 1, 1, 1]}, r"unknown: levels.2.blocks.1"),
        ({"layer_scale": None}, r"unknown: levels.0.blocks.0.gamma1"),
        ({"offset_scale": 1.0}, r"offset_scale is 2.0 there and 1.0"),
        ({"post_norm": False, "layer_scale": 1e-5}, r"missing: levels.0.norm"),
    ],
)  # fmt: skip
def test_weights_of_another_network(changes: dict[str, Any], message: str, tmp_path: Path):
    write_published(tmp_path, "b")
    with pytest.raises(ConfigError, match=message) as caught:
        initial.open_initial(spec(tmp_path, **{**POOLING, **STYLES["b"], **changes}))
    assert str(caught.value).startswith("model.init: ")
    assert "set model.backbone" in str(caught.value)
    assert len(str(caught.value)) < 900


def test_half_a_part_is_no_new_part(tmp_path: Path):
    model = random_model("h", num_classes=0)
    state = model.state_dict()
    del state["clip_projector.cross_dcn.q.weight"]
    save_file(state, tmp_path / "half.safetensors")
    with pytest.raises(ConfigError, match=r"1 missing: clip_projector.cross_dcn.q.weight"):
        initial.open_initial(spec(tmp_path / "half.safetensors", **STYLES["h"]))


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_what_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refused(path: Path | str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            initial.open_initial(spec(path, **STYLES["t"]))

    refused(tmp_path / "absent.pth", "no file or folder")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    refused(tmp_path / "run", "m3i export")
    torch.save({"model": Payload()}, tmp_path / "evil.pth")
    refused(tmp_path / "evil.pth", "cannot be read as plain tensors")
    assert "executed" not in capsys.readouterr().out
    (tmp_path / "torn.safetensors").write_bytes(b"1234567890")
    refused(tmp_path / "torn.safetensors", "cannot be read as safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    refused(tmp_path / "empty.safetensors", "holds no tensor")
    folder = tmp_path / "index"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    for content, message in (
        ("{", "as JSON"),
        ('{"weight_map": {"a": "../x"}}', "weight_map"),
        ('{"weight_map": {"a": "x.safetensors"}}', "x.safetensors"),
    ):
        index.write_text(content)
        refused(folder, message)

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused("owner/name@main", "the Hub does not give it: no route to host; where nodes")


def test_a_repository_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_published(tmp_path, "b")
    asked = {}

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(name=name, revision=revision, files=allow_patterns)
        return str(tmp_path)

    files = ["config.json", "model.safetensors", "modeling.py", "pytorch_model.bin"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    _, found = started(spec("owner/name@v1", **{**POOLING, **STYLES["b"]}))
    assert asked == {
        "name": "owner/name", "revision": "v1", "files": ["config.json", "model.safetensors"]
    }  # fmt: skip
    assert found.record()["init"] == "owner/name@v1"


VIT = {"width": 32, "depth": 2, "heads": 4, "pool_heads": 4, "embed_dim": 24}


def timm_vit(**arguments: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=32, depth=2, num_heads=4, **arguments
    ).eval()


@pytest.mark.parametrize("x_first", [False, True])
def test_a_vit_of_timm_computes_the_same(x_first: bool, tmp_path: Path):
    model = timm_vit(num_classes=3, class_token=False, global_pool="avg", fc_norm=False)
    positions = grid_embedding((4, 4), 32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.pos_embed[0] = positions.roll(16, 1) if x_first else positions
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    backbone, found = started(spec(tmp_path / "vit.safetensors", "vit", **VIT))
    with torch.no_grad():
        tokens = model.forward_features(IMAGES)
        tokens = tokens.roll(16, -1) if x_first else tokens
        torch.testing.assert_close(backbone.features(IMAGES), tokens)
    assert ("x before y" in "".join(found.notes)) == x_first
    assert {n.partition(".")[0] for n in found.new} == {"attention_pool"}


def test_folders_of_timm_and_transformers_say_their_heads(tmp_path: Path):
    model = timm_vit()
    (tmp_path / "timm").mkdir()
    save_file(model.state_dict(), tmp_path / "timm" / "model.safetensors")
    arguments = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 4}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": arguments}
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    settings = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        image_size=64,
    )  # fmt: skip
    other = ViTForImageClassification(settings)
    other.save_pretrained(tmp_path / "hf")
    for source in ("timm", "hf"):
        backbone, found = started(spec(tmp_path / source, "vit", **VIT))
        assert "class token" in "".join(found.notes)
        assert "learned" in "".join(found.notes)
        with pytest.raises(ConfigError, match="heads is 4 there and 2 in the configuration"):
            initial.open_initial(spec(tmp_path / source, "vit", **VIT | {"heads": 2}))
    state = other.state_dict()
    keys = [n for n in state if "layers.1" in n or "layer.1" in n]
    joined = torch.cat([state[n] for part in ("q", "k", "v") for n in keys
                        if n.endswith((f".{part}_proj.weight", f"{part}uery.weight",
                                       f"{part}ey.weight", f"{part}alue.weight"))])  # fmt: skip
    assert torch.equal(backbone.blocks[1].attn.qkv.weight, joined)
    (tmp_path / "timm" / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    with pytest.raises(ConfigError, match="timm builds no ViT"):
        initial.open_initial(spec(tmp_path / "timm", "vit", **VIT))


def test_a_vit_is_no_intern_image(tmp_path: Path):
    save_file(timm_vit().state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(ConfigError, match=r"\d+ missing: .* and \d+ more; \d+ unknown: "):
        initial.open_initial(spec(tmp_path / "vit.safetensors", **{**POOLING, **STYLES["t"]}))


def test_three_doors_give_the_same_logits(tmp_path: Path):
    for style in STYLES:
        folder = tmp_path / style
        model = write_published(folder, style)
        overlay = {"file": str(folder / "model.safetensors"), "num_classes": 5}
        of_timm = timm.create_model(
            "intern_image", pretrained=True, pretrained_cfg_overlay=overlay, **STYLES[style]
        ).eval()
        of_hf = hf.InternImageForImageClassification.from_pretrained(folder)
        with torch.no_grad():
            logits = model(IMAGES)
            assert torch.equal(of_timm(IMAGES), logits)
            assert torch.equal(of_hf(IMAGES).logits, logits)
    assert hub_name("head.weight") == "model.head.weight"
