"""InternImages with random weights, small, in the form in which the published ones come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from m3i_scale.models.intern_image import InternImage
from m3i_scale.models.weights import hub_name

_SIZES = {"channels": 16, "depths": [1, 1, 2, 1], "groups": [1, 2, 4, 8]}
CLASSES = 5
# The norm styles of T, of S to XL, and of H.
STYLES: dict[str, dict[str, Any]] = {
    "t": dict(_SIZES),
    "b": {**_SIZES, "layer_scale": 1e-5, "post_norm": True, "offset_scale": 2.0},
    "h": {
        **_SIZES,
        "res_post_norm": True,
        "level2_post_norm": True,
        "level2_post_norm_block_ids": [1],
        "dw_kernel_size": 5,
        "center_feature_scale": True,
        "use_clip_projector": True,
        "clip_projector_width": 32,
        "clip_heads": 4,
        "clip_embed_dim": 24,
    },
}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def random_model(style: str, **options: Any) -> InternImage:
    """A network none of whose weights has its initial value, in evaluation mode."""
    torch.manual_seed(0)
    model = InternImage(**STYLES[style], **({"num_classes": CLASSES} | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.1 * torch.randn_like(buffer))
    return model.eval()


def write_published(folder: Path, style: str) -> InternImage:
    """A folder as on the Hub, with code that must not run; the network of its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    model = random_model(style)
    state = {hub_name(name): value.clone() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    code = "configuration_internimage.InternImageConfig"
    config = {
        "model_type": "internimage",
        "architectures": ["InternImageModelForImageClassification"],
        "auto_map": {"AutoConfig": code, "AutoModelForImageClassification": "modeling.Published"},
        "num_classes": CLASSES,
        "core_op": "DCNv3",
        "act_layer": "GELU",
        "norm_layer": "LN",
        "cls_scale": 1.5,
        "with_cp": False,
        "drop_rate": 0.0,
        **STYLES[style],
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("configuration_internimage.py", "modeling.py"):
        (folder / name).write_text("raise SystemExit('remote code was executed')\n")
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 64},
        "crop_size": {"height": 64, "width": 64},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def write_timm_config(folder: Path, options: dict[str, Any], classes: int) -> None:
    """config.json of a folder that `timm.create_model("local-dir:FOLDER")` reads."""
    config = {
        "architecture": "intern_image",
        "num_classes": classes,
        "model_args": {**options, "pre_classifier": classes > 0},
        "pretrained_cfg": {
            "input_size": [3, 64, 64],
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
            "classifier": "head",
            "first_conv": "patch_embed.conv1",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
