"""Frozen teachers: what they are loaded from, what they see, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTForImageClassification,
)

from helpers.small import small_config
from helpers.teachers import (
    ARCHITECTURE,
    TINY,
    load_teacher,
    small_data,
    write_timm_file,
    write_timm_folder,
)
from m3i_scale.config import Backbone, ConfigError, Model
from m3i_scale.integrations.initial import open_initial
from m3i_scale.models.backbone import build_backbone
from m3i_scale.models.frozen import on_grid

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
GRID = (4, 4)
HF = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "image_size": 64, "patch_size": 16,
}  # fmt: skip


def renormalised(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Images as the data normalise them, as another network wants them."""
    data = small_data()
    old_mean, old_std, new_mean, new_std = (
        torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std, mean, std)
    )
    return (images * old_std + old_mean - new_mean) / new_std


@torch.no_grad()
def test_a_folder_of_timm(tmp_path: Path):
    model = write_timm_folder(tmp_path / "timm", img_size=64)
    found = load_teacher(small_data(), source=str(tmp_path / "timm"))
    tokens, pooled = found.encoder(IMAGES, GRID)
    seen = model.forward_features(renormalised(IMAGES, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    torch.testing.assert_close(tokens, seen[:, 1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled, seen[:, 0], rtol=1e-4, atol=1e-5)
    assert (found.encoder.width, found.encoder.pooled_width) == (24, 24)
    assert not found.encoder.training
    assert not found.encoder.train().network.training
    assert not any(p.requires_grad for p in found.encoder.parameters())
    assert "timm's vit_tiny_patch16_224" in found.line
    assert "its config.json" in found.line


@torch.no_grad()
def test_a_file_needs_its_architecture_and_may_see_images_of_another_size(tmp_path: Path):
    model = write_timm_file(tmp_path / "w.safetensors", img_size=48, dynamic_img_size=True)
    spec = {"source": str(tmp_path / "w.safetensors")}
    with pytest.raises(ConfigError, match=r"frozen_teachers\.t: .*does not say .*architecture"):
        load_teacher(small_data(), **spec)
    spec |= {"architecture": ARCHITECTURE, "options": TINY | {"img_size": 48}, "image_size": 48}
    found = load_teacher(small_data(), **spec)
    tokens, _ = found.encoder(IMAGES, GRID)
    small = F.interpolate(IMAGES, (48, 48), mode="bicubic", antialias=True)
    seen = model.forward_features(renormalised(small, [0.5] * 3, [0.5] * 3))[:, 1:]
    seen = seen.transpose(1, 2).unflatten(2, (3, 3))
    expected = F.interpolate(seen, GRID, mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)
    own = load_teacher(small_data(), **spec, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    seen = model.forward_features(small)[:, 1:].transpose(1, 2).unflatten(2, (3, 3))
    expected = on_grid(seen, GRID).flatten(2).transpose(1, 2)
    torch.testing.assert_close(own.encoder(IMAGES, GRID)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_coarser_grid_gets_the_means_of_its_patches():
    features = torch.randn(1, 5, 8, 8)
    coarse = on_grid(features.expand(2, -1, -1, -1), (1, 1))
    assert coarse.shape == (2, 5, 1, 1)
    constant = torch.ones(1, 1, 8, 8) * 3
    torch.testing.assert_close(on_grid(constant, (4, 2)), torch.full((1, 1, 4, 2), 3.0))
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    torch.testing.assert_close(on_grid(ramp, (8, 4))[0, 0, 0, 1:3], torch.tensor([2.5, 4.5]))


TEXT = HF | {"vocab_size": 9, "num_hidden_layers": 1}
CONVOLUTIONS: dict[str, Any] = {"hidden_sizes": [4, 8, 12, 16], "depths": [1] * 4}
FOREIGN: dict[str, Any] = {
    "classifier without a pooler": lambda: ViTForImageClassification(ViTConfig(**HF)),
    "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**HF)),
    "two towers": lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=HF)),
    "convolutions": lambda: ConvNextModel(ConvNextConfig(**CONVOLUTIONS)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", FOREIGN)
def test_folders_of_transformers(name: str, tmp_path: Path):
    torch.manual_seed(5)
    model = FOREIGN[name]().eval()
    model.save_pretrained(tmp_path / "hf")
    normal = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(normal))
    before = torch.get_rng_state()
    found = load_teacher(small_data(), source=str(tmp_path / "hf"))
    assert torch.equal(before, torch.get_rng_state())
    tokens, pooled = found.encoder(IMAGES, GRID)
    images = renormalised(IMAGES, [0.5] * 3, [0.5] * 3)
    inside = getattr(model, "vit", None) or getattr(model, "vision_model", model)
    seen = inside(pixel_values=images)
    last = seen.last_hidden_state
    if last.dim() == 4:
        expected, whole = on_grid(last, GRID).flatten(2).transpose(1, 2), seen.pooler_output
    else:
        expected = last[:, -16:]
        whole = last[:, 0] if name.startswith("classifier") else seen.pooler_output
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled, whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pooling", [True, False])
def test_an_export_of_a_run(pooling: bool, tmp_path: Path):
    described = small_config(tmp_path).model.backbone
    torch.manual_seed(5)
    backbone = build_backbone(described.name, **described.options).eval()
    state = {n: p for n, p in backbone.state_dict().items() if pooling or "clip_projector" not in n}
    run = {"data": {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0]}}
    metadata = {"backbone": described.model_dump_json(), "config": json.dumps(run)}
    save_file(state, tmp_path / "run.safetensors", metadata=metadata)
    found = load_teacher(small_data(), source=str(tmp_path / "run.safetensors"))
    tokens, pooled = found.encoder(IMAGES, GRID)
    expected = backbone.features(renormalised(IMAGES, [0.1, 0.2, 0.3], [1.0, 2.0, 3.0]))
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)
    if pooling:
        torch.testing.assert_close(pooled, backbone.pool(expected), rtol=1e-4, atol=1e-5)
    else:
        assert pooled is None
        assert found.encoder.pooled_width is None
    state = {n: p for n, p in state.items() if "dcnv3_head" not in n}
    save_file(state, tmp_path / "run.safetensors", metadata=metadata)
    with pytest.raises(ConfigError, match=r"no weights of dcnv3_head_x\d, without which"):
        load_teacher(small_data(), source=str(tmp_path / "run.safetensors"))


def test_the_checksum_is_of_weights_not_of_files(tmp_path: Path):
    write_timm_folder(tmp_path / "a", img_size=64)
    write_timm_folder(tmp_path / "b", img_size=64)
    state = load_file(tmp_path / "b" / "model.safetensors")
    save_file(dict(reversed(state.items())), tmp_path / "b" / "model.safetensors")
    identities = [load_teacher(small_data(), source=str(tmp_path / n)).identity for n in "ab"]
    assert identities[0] == identities[1]
    state["norm.bias"][3] += 1
    save_file(state, tmp_path / "b" / "model.safetensors")
    changed = load_teacher(small_data(), source=str(tmp_path / "b")).identity
    assert changed["sha256"] != identities[0]["sha256"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "vit_huge_patch7"}, "timm has no model 'vit_huge_patch7'"),
        ({"architecture": "hf-hub:a/b"}, "timm has no model 'hf-hub:a/b'"),
        ({"options": TINY | {"checkpoint_path": "/evil.pth"}}, "says how to read weights"),
        ({"options": TINY | {"no_such": 1}}, "timm builds no vit_tiny_patch16_224"),
        ({"options": {**TINY, "depth": 3}}, r"another network: 12 missing: blocks\.2"),
        ({"options": {**TINY, "depth": 1}}, r"another network: 12 unknown: blocks\.1"),
        ({"options": {**TINY, "num_heads": 2, "embed_dim": 16}}, "of another shape: blocks"),
        ({"image_size": 40}, r"takes no images of 40 pixels .*frozen_teachers\.t\.image_size"),
        ({"architecture": "convnext_atto", "options": {}, "image_size": 56},
         r"no whole number of timm's convnext_atto's patches of 32; set .*image_size=64"),
        ({"source": "absent.safetensors"}, "no file or folder"),
        ({"mean": [0.5, 0.5, 0.5]}, "mean and std belong together"),
    ],
)  # fmt: skip
def test_what_is_refused_in_one_sentence(changes: dict[str, Any], message: str, tmp_path: Path):
    write_timm_file(tmp_path / "w.safetensors", img_size=64)
    spec = {"source": str(tmp_path / "w.safetensors"), "architecture": ARCHITECTURE}
    spec |= {"options": TINY | {"img_size": 64}} | changes
    with pytest.raises(ValueError, match=message):
        load_teacher(small_data(), **spec)


def test_descriptions_of_strangers_name_no_code(tmp_path: Path):
    write_timm_folder(tmp_path / "t", img_size=64)
    file = tmp_path / "t" / "config.json"
    content = json.loads(file.read_text())
    content["model_args"]["checkpoint_path"] = "evil.pth"
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="checkpoint_path says how to read weights"):
        load_teacher(small_data(), source=str(tmp_path / "t"))
    ViTForImageClassification(ViTConfig(**HF)).save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    content = json.loads(file.read_text())
    code = {"auto_map": {"AutoModel": "evil.Model"}, "attn_implementation": "evil/kernels"}
    file.write_text(json.dumps(content | code | {"_attn_implementation": "evil/kernels"}))
    load_teacher(small_data(), source=str(tmp_path / "hf"))
    file.write_text(json.dumps(content | {"model_type": "evil"}))
    with pytest.raises(ConfigError, match="knows no model_type 'evil'"):
        load_teacher(small_data(), source=str(tmp_path / "hf"))


SWIN = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "img_size": 64}


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "options", "width"),
    [
        ("swin_tiny_patch4_window7_224", SWIN, 96),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [4, 8, 12, 16]}, 16),
        ("resnet10t", {}, 512),
        ("vit_small_patch14_reg4_dinov2", TINY, 24),
    ],
)
def test_networks_of_other_kinds(
    architecture: str, options: dict[str, Any], width: int, tmp_path: Path
):
    torch.manual_seed(2)
    any_size = {"dynamic_img_size": True} if architecture.startswith("vit") else {}
    model = timm.create_model(architecture, num_classes=0, **options, **any_size).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    size = 56 if "patch14" in architecture else 64
    found = load_teacher(
        small_data(), source=str(tmp_path / "w.safetensors"), architecture=architecture,
        options=options, image_size=size, mean=small_data().mean, std=small_data().std,
    )  # fmt: skip
    tokens, pooled = found.encoder(IMAGES, GRID)
    assert tokens.shape == (2, 16, width)
    images = F.interpolate(IMAGES, (size, size), mode="bicubic", antialias=True)
    last = model.forward_features(images if size != 64 else IMAGES)
    torch.testing.assert_close(
        pooled, model.forward_head(last, pre_logits=True), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_an_exported_vit_keeps_its_positions_at_another_size(tmp_path: Path):
    options = {"width": 24, "depth": 1, "heads": 2, "pool_heads": 2, "embed_dim": 24}
    torch.manual_seed(5)
    backbone = build_backbone("vit", **options).eval()
    data = {"mean": small_data().mean, "std": small_data().std, "image_size": 64}
    metadata = {
        "backbone": json.dumps({"name": "vit", "options": options}),
        "config": json.dumps({"data": data}),
    }
    file = str(tmp_path / "vit.safetensors")
    save_file(backbone.state_dict(), file, metadata=metadata)
    same = load_teacher(small_data(), source=file).encoder(IMAGES, GRID)[0]
    torch.testing.assert_close(same, backbone.features(IMAGES), rtol=1e-4, atol=1e-5)
    backbone.position_grid = 4
    large = F.interpolate(IMAGES, (128, 128), mode="bicubic", antialias=True)
    expected = backbone.features(large).mT.unflatten(2, (8, 8))
    found = load_teacher(small_data(), source=file, image_size=128).encoder(IMAGES, GRID)[0]
    expected = on_grid(expected, GRID).flatten(2).mT
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    start = Model(backbone=Backbone(name="vit", options=options), init=file)
    notes = open_initial(start).lines()
    assert "model.backbone.options.position_grid=4, so that positions are rescaled" in notes[-1]
    start = Model(backbone=Backbone(name="vit", options=options | {"position_grid": 4}), init=file)
    assert not any("position_grid" in line for line in open_initial(start).lines())
