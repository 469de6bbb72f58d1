"""One safetensors file of a model with its configuration, and the backbone that it describes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open

from m3i_scale.config import Config
from m3i_scale.config.model import Backbone as ConfiguredBackbone
from m3i_scale.models.backbone import Backbone, build_backbone
from m3i_scale.models.weights import load_published, load_weights, require_fit
from m3i_scale.transfer import tensor_file
from m3i_scale.transfer.loading import Weights, Which, stored_kinds
from m3i_scale.transfer.tensor_file import Dtype, Entry

Part = Literal["backbone", "all"]
BACKBONE = "student.backbone."
WEIGHTS = "model.safetensors"  # the weights in a folder


def export(
    weights: Weights,
    config: Config,
    path: str | os.PathLike[str],
    *,
    which: Which = "student",
    part: Part = "backbone",
    dtype: Dtype = "fp32",
    progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Write one model of a checkpoint to a safetensors file.

    Tensors of the backbone have the published names (those of `InternImage` or `ViT`); with
    part="all" all networks are there under the names of `m3i_scale.objective.m3i.M3I`. The metadata
    holds, as JSON, the backbone's name and options and the whole configuration of the run.

    Args:
        weights: the checkpoint.
        config: of the run.
        path: the file to write; it appears complete or not at all.
        which: "student", or "teacher" for the averages of the image encoder.
        part: "backbone", or "all" networks.
        dtype: "fp32" as stored, or "bf16", rounded to nearest.
        progress: called with the number of bytes after each piece.

    Raises:
        ValueError: the run has no averages, the checkpoint no backbone, or the folder is missing.
        OSError: the file cannot be written.
    """
    tensors = entries(weights, config, which, part)
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}; make it first")
    tensor_file.write(
        path,
        weights,
        tensors,
        dtype=dtype,
        metadata=_metadata(weights, config, which, part),
        progress=progress,
    )


def size(
    weights: Weights, config: Config, *, part: Part = "backbone", dtype: Dtype = "fp32"
) -> int:
    """Bytes of tensors that `export` will write."""
    return tensor_file.tensor_bytes(entries(weights, config, "student", part), dtype)


def load_backbone(path: str | os.PathLike[str]) -> Backbone:
    """Build the backbone that an exported file or folder describes, with its weights, in float32.

    The pooling keeps its initialisation where the file has none: a run whose targets are all dense
    does not train it.

    Raises:
        ValueError: the file is not one that `export` wrote with part="backbone", or does not fit.
    """
    path = Path(path)
    path = path / WEIGHTS if path.is_dir() else path
    metadata = read_metadata(path)
    if metadata.get("part") != "backbone":
        raise ValueError(
            f"{path} does not describe a backbone; write it with `m3i export --part backbone`"
        )
    try:
        described = ConfiguredBackbone.model_validate_json(metadata.get("backbone", ""))
    except ValueError as error:
        raise ValueError(f"{path} does not describe a backbone ({error})") from None
    state = {name: tensor.float() for name, tensor in load_published(path).items()}
    with torch.device("meta"):  # what does not fit is refused before it fills the memory
        skeleton = build_backbone(described.name, **described.options)
    require_fit(skeleton, state, fresh=untrained(skeleton, state))  # type: ignore[arg-type]
    backbone = build_backbone(described.name, **described.options)
    load_weights(backbone, state, fresh=untrained(backbone, state))  # type: ignore[arg-type]
    return backbone


def untrained(backbone: Backbone, names: Iterable[str]) -> list[str]:
    """The pooling, if no name is of it: the run never trained it, its targets were all dense."""
    modules = backbone.named_modules()  # type: ignore[attr-defined]
    (name,) = (name for name, module in modules if module is backbone.pooling)
    return [] if any(key.startswith(f"{name}.") for key in names) else [name]


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file, empty if it has none.

    Raises:
        ValueError: it is not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from None


def entries(
    weights: Weights, config: Config, which: Which, part: Part = "backbone"
) -> dict[str, Entry]:
    """The tensors of a model by the names that `export` gives them.

    Raises:
        ValueError: the run has no averages, or the checkpoint no such part.
    """
    prefix = BACKBONE if part == "backbone" else ""
    shapes = {name: shape for name, shape in weights.shapes.items() if name.startswith(prefix)}
    if not shapes:
        raise ValueError(f"{weights.path} holds no parameter named {prefix}*")
    kinds = stored_kinds(shapes, which, has_teacher=config.objective.has_teacher)
    return {
        name.removeprefix(prefix): Entry(kinds[name], name, list(shape))
        for name, shape in shapes.items()
    }


def _metadata(weights: Weights, config: Config, which: Which, part: Part) -> dict[str, str]:
    return {
        "format": "pt",
        "part": part,
        "which": which,
        "step": str(weights.state["step"]),
        "backbone": json.dumps(config.model.backbone.model_dump(mode="json")),
        "config": json.dumps(_without_secrets(config).model_dump(mode="json")),
    }


def _without_secrets(config: Config) -> Config:
    """Without what opens the storage: exported files are passed on."""
    sources = [
        source.model_copy(update={"index": _without_credentials(source.index)})
        for source in config.data.sources
    ]
    storage = config.data.storage.model_copy(update={"options": {}})
    data = config.data.model_copy(update={"sources": sources, "storage": storage})
    return config.model_copy(update={"data": data})


def _without_credentials(index: str) -> str:
    """A URL without user, password and query (a signature, often); other paths as they are."""
    scheme, separator, rest = index.partition("://")
    if not separator:
        return index
    host, slash, path = rest.partition("?")[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
