"""The backbone of a run under the names, and with the configuration files, of other libraries.

| backbone | timm | transformers |
| --- | --- | --- |
| ViT | `VisionTransformer` without a class token | `IJepaModel`, a ViT without a class token |
| InternImage | `intern_image_*` of `integrations.timm_models` | `InternImageModel` of `.hf` |

A ViT's fixed positions become a tensor of the run's grid, and its attention pooling stays behind:
neither library has it. What they compute, the tokens after the last norm, is what ours computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from m3i_scale.config import Config, Data
from m3i_scale.models.backbone import backbone_options, with_defaults
from m3i_scale.models.intern_image import InternImage
from m3i_scale.models.pooling import AttentionPool
from m3i_scale.models.positions import grid_embedding
from m3i_scale.models.vit import ViT
from m3i_scale.models.weights import hub_name
from m3i_scale.transfer.tensor_file import Dtype, Entry, Tensors

Library = Literal["timm", "transformers"]
# Arguments of `InternImage` that say how it computes, not what.
_RUNTIME = {"checkpoint_blocks", "fused_offset_branch", "half_blend"}
# Parts of a ViT's block as published files of transformers name them; it renames them on loading.
_VIT_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_VIT_WHOLE = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers
_EPSILON = 1e-6  # of every LayerNorm


class Layout(NamedTuple):
    """A model as a library reads it."""

    tensors: Tensors  # of model.safetensors
    config: dict[str, Any]  # config.json
    pooling: bool  # whether the attention pooling is in it


def backbone_class(config: Config) -> type:
    """The class of a run's backbone."""
    build, _ = backbone_options(config.model.backbone.name, config.model.backbone.options)
    assert isinstance(build, type)
    return build


def arguments(config: Config) -> dict[str, Any]:
    """All arguments of the backbone's class, defaults included."""
    backbone = config.model.backbone
    return with_defaults(*backbone_options(backbone.name, backbone.options))


def layout(library: Library, config: Config, entries: Mapping[str, Entry], dtype: Dtype) -> Layout:
    """Tensors and config.json of a run's backbone for a library.

    Args:
        library: that reads them.
        config: of the run.
        entries: the backbone's tensors, by their names in `InternImage` or `ViT`.
        dtype: of the file.

    Raises:
        ValueError: the library has no counterpart of the backbone.
    """
    known = {
        ("timm", ViT): _vit_timm,
        ("transformers", ViT): _vit_transformers,
        ("timm", InternImage): _intern_image_timm,
        ("transformers", InternImage): _intern_image_transformers,
    }
    kind = backbone_class(config)
    if (library, kind) not in known:
        raise ValueError(
            f"{library} has no counterpart of backbone {config.model.backbone.name}; export it "
            "with --format m3i or --format onnx"
        )
    made = known[library, kind](config, entries)
    if library == "transformers":
        made.config["dtype"] = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    return made


def image_processor(data: Data) -> dict[str, Any]:
    """preprocessor_config.json: the shorter side scaled, the centre cut, normalised as in the run.

    `CLIPImageProcessor` of transformers reads it.
    """
    size = data.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": _RESAMPLE[data.augmentation.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data.mean),
        "image_std": list(data.std),
    }


# --------------------------------------------------------------------------------------------- ViT


def _positions(config: Config) -> Tensor:
    """The position embedding (1, N, D) of the run's grid."""
    options = arguments(config)
    side = config.data.image_size // options["patch_size"]
    trained = options["position_grid"]
    return grid_embedding((side, side), options["width"], trained_side=trained)[None]


def _without_pooling(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    return {name: e for name, e in entries.items() if not name.startswith("attention_pool.")}


def _vit_timm(config: Config, entries: Mapping[str, Entry]) -> Layout:
    options = arguments(config)
    model = {
        "img_size": config.data.image_size,
        "patch_size": options["patch_size"],
        "embed_dim": options["width"],
        "depth": options["depth"],
        "num_heads": options["heads"],
        "mlp_ratio": options["mlp_ratio"],
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,  # the norm comes before the mean
    }
    content = _timm_config(
        "vit_base_patch16_224",  # every size of it stands in model_args
        model,
        config.data,
        options["width"],
        fixed_input_size=True,  # that of the position embedding
        first_conv="patch_embed.proj",
    )
    tensors: dict[str, Entry | Tensor] = {"pos_embed": _positions(config)}
    tensors |= _without_pooling(entries)
    return Layout(tensors, content, pooling=False)


def _timm_config(
    architecture: str, model: Mapping[str, Any], data: Data, width: int, **pretrained: Any
) -> dict[str, Any]:
    """config.json as timm writes it; images are prepared as in the run."""
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": width,
        "model_args": dict(model),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, data.image_size, data.image_size],
            "interpolation": data.augmentation.interpolation,
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(data.mean),
            "std": list(data.std),
            "num_classes": 0,
            "pool_size": None,
            "classifier": "head",
            **pretrained,
        },
    }


def _vit_transformers(config: Config, entries: Mapping[str, Entry]) -> Layout:
    options = arguments(config)
    tensors: dict[str, Entry | Tensor] = {"embeddings.position_embeddings": _positions(config)}
    for name, entry in _without_pooling(entries).items():
        tensors |= _renamed(name, entry)
    content = {
        "model_type": "ijepa",
        "architectures": ["IJepaModel"],
        "hidden_size": options["width"],
        "num_hidden_layers": options["depth"],
        "num_attention_heads": options["heads"],
        "intermediate_size": int(options["width"] * options["mlp_ratio"]),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": _EPSILON,
        "image_size": config.data.image_size,
        "patch_size": options["patch_size"],
        "num_channels": 3,
        "qkv_bias": True,
    }
    return Layout(tensors, content, pooling=False)


def _renamed(name: str, entry: Entry) -> dict[str, Entry]:
    """A tensor of `ViT` under its name in transformers; the joint projection becomes three."""
    module, _, leaf = name.rpartition(".")
    if module in _VIT_WHOLE:
        return {f"{_VIT_WHOLE[module]}.{leaf}": entry}
    _, number, part = module.split(".", 2)  # blocks.N.part
    layer = f"encoder.layer.{number}"
    if part != "attn.qkv":
        return {f"{layer}.{_VIT_BLOCK[part]}.{leaf}": entry}
    shape = [entry.shape[0] // 3, *entry.shape[1:]]
    third = entry.elements // 3
    return {
        f"{layer}.attention.attention.{what}.{leaf}": entry._replace(
            shape=shape, start=entry.start + n * third
        )
        for n, what in enumerate(("query", "key", "value"))
    }


# ------------------------------------------------------------------------------------- InternImage


def _options(config: Config, *without: str) -> dict[str, Any]:
    """Arguments of `InternImage` but for those of its classifier, which a backbone has not."""
    left_out = {"num_classes", *_RUNTIME, *without}
    return {name: value for name, value in arguments(config).items() if name not in left_out}


def _intern_image_timm(config: Config, entries: Mapping[str, Entry]) -> Layout:
    model = _options(config, "drop_path_rate", "drop_path_type")
    content = _timm_config(
        config.model.backbone.name,
        {**model, "pre_classifier": False},
        config.data,
        model["clip_projector_width"],
        first_conv="patch_embed.conv1",
    )
    tensors: dict[str, Entry | Tensor] = {**entries, **_untrained_pooling(config, entries)}
    return Layout(tensors, content, pooling=_has_pooling(entries))


def _intern_image_transformers(config: Config, entries: Mapping[str, Entry]) -> Layout:
    content = {
        "model_type": "internimage",
        "architectures": ["InternImageModel"],
        **_options(config),
        "num_classes": 0,
    }
    tensors: dict[str, Entry | Tensor] = {**entries, **_untrained_pooling(config, entries)}
    named = {hub_name(name): tensor for name, tensor in tensors.items()}
    return Layout(named, content, pooling=_has_pooling(entries))


_POOLING = "clip_projector."


def _has_pooling(entries: Mapping[str, Entry]) -> bool:
    return any(name.startswith(_POOLING) for name in entries)


def _untrained_pooling(config: Config, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """The attention pooling as a network begins with it, where the run has not trained it.

    The libraries want all tensors of a network, and a classifier may be trained on top.
    """
    if _has_pooling(entries):
        return {}
    options = arguments(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        pooling = AttentionPool(
            options["clip_projector_width"], options["clip_heads"], options["clip_embed_dim"]
        )
    return {_POOLING + name: tensor for name, tensor in pooling.state_dict().items()}
