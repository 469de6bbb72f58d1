"""Small networks of other people, with random weights, as files and folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from m3i_scale.config import Data, FrozenTeacher, Source
from m3i_scale.integrations.frozen import Loaded, load, open_frozen
from m3i_scale.models.frozen import FrozenEncoder, Normalisation, Seen

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 3}
ARCHITECTURE = "vit_tiny_patch16_224"


def tiny_vit(**options: Any) -> nn.Module:
    """A ViT of timm, in evaluation mode."""
    torch.manual_seed(3)
    return timm.create_model(ARCHITECTURE, **TINY, **options).eval()


def write_timm_file(path: Path, **options: Any) -> nn.Module:
    """Weights without a word about what they are of; the network."""
    model = tiny_vit(**options)
    save_file(model.state_dict(), path)
    return model


def write_timm_folder(folder: Path, **options: Any) -> nn.Module:
    """A folder as the Hub has them; the network."""
    folder.mkdir()
    model = write_timm_file(folder / "model.safetensors", **options)
    normal = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    content = {
        "architecture": ARCHITECTURE, "model_args": TINY | options, "pretrained_cfg": normal,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content))
    return model


TOWER = {
    "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
}  # fmt: skip


def write_clip_folder(folder: Path) -> CLIPModel:
    """CLIP of transformers; the network."""
    torch.manual_seed(4)
    vision = TOWER | {"image_size": 64, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=TOWER | {"vocab_size": 9}, vision_config=vision))
    model.save_pretrained(folder)
    return model


def small_data(image_size: int = 64) -> Data:
    """A data section of images of a size."""
    source = Source(name="x", index="none", kind="text")
    return Data(image_size=image_size, sources=[source])


def load_teacher(data: Data, **spec: Any) -> Loaded:
    """A frozen teacher `t` by its section, in float32 on the CPU."""
    source = open_frozen("t", FrozenTeacher.model_validate(spec), data)
    return load(source, data, torch.device("cpu"), torch.float32)


class Patches(nn.Module):
    """A linear map of patches, and the mean of its map."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, stride, stride)

    def forward(self, images: Tensor) -> Seen:
        features = self.embed(images).tanh()
        return Seen(features, features.mean((2, 3)))


def linear_teacher(width: int = 10, stride: int = 16) -> FrozenEncoder:
    """A frozen teacher of one layer, in the normalisation of the images it gets."""
    torch.manual_seed(11)
    same = Normalisation((0.5,) * 3, (0.2,) * 3)
    network = Patches(width, stride)
    return FrozenEncoder(network, same, same, image_size=None, width=width, pooled_width=width)
