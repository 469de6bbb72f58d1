"""A backbone as a folder that a library loads and the Hugging Face Hub shows.

README.md                  the model card
model.safetensors          the weights (model.onnx with format onnx)
config.json                of timm and transformers
preprocessor_config.json   how images are prepared, for transformers
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from m3i_scale.config import Config
from m3i_scale.models.backbone import Backbone, build_backbone
from m3i_scale.models.weights import load_weights
from m3i_scale.transfer import card, export, formats, onnx_file, tensor_file
from m3i_scale.transfer.export import WEIGHTS
from m3i_scale.transfer.loading import Weights, Which
from m3i_scale.transfer.tensor_file import Dtype, Entry

Format = Literal["m3i", "timm", "transformers", "onnx"]
FORMATS: tuple[Format, ...] = ("m3i", "timm", "transformers", "onnx")
ONNX = "model.onnx"


def export_folder(
    weights: Weights,
    config: Config,
    folder: Path,
    *,
    format: Format,
    which: Which = "student",
    dtype: Dtype = "fp32",
    figures: str = "",
    progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Write a backbone as a folder; it appears complete or not at all.

    Formats m3i, timm and transformers need memory for a few megabytes of weights only, onnx for
    the backbone several times.

    Args:
        weights: the checkpoint.
        config: of the run.
        folder: to write; it must not exist, or be empty.
        format: what reads it.
        which: "student", or "teacher" for the averages.
        dtype: "fp32" as stored, or "bf16".
        figures: section of the model card, as `card.figures` gives it.
        progress: called with the number of bytes after each piece of weights.

    Raises:
        ValueError: the folder holds files, the format has no counterpart of the backbone or of the
            dtype, ONNX is not installed, or the run has no averages.
        OSError: something cannot be written.
    """
    require_new(folder)
    entries = export.entries(weights, config, which)
    partial = folder.absolute().with_name(f".{folder.absolute().name}.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        pooling = _write_weights(weights, config, partial, format, which, dtype, entries, progress)
        _write_json(partial / "preprocessor_config.json", formats.image_processor(config.data))
        facts = card.Facts(
            format=format,
            which=which,
            step=int(weights.state["step"]),
            dtype=dtype,
            parameters=sum(entry.elements for entry in entries.values()),
            pooling=pooling,
            figures=figures,
        )
        (partial / "README.md").write_text(card.card(config, facts), "utf-8")
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_new(folder: Path) -> None:
    """Raise ValueError unless `folder` can be written without mixing with other files."""
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files already; name another folder, or empty it")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder")


def _write_weights(
    weights: Weights,
    config: Config,
    folder: Path,
    format: Format,
    which: Which,
    dtype: Dtype,
    entries: dict[str, Entry],
    progress: Callable[[int], None],
) -> bool:
    """Write the weights and what describes them; return whether the pooling is among them."""
    if format == "m3i":
        target = folder / WEIGHTS
        export.export(weights, config, target, which=which, dtype=dtype, progress=progress)
        return not export.untrained(_skeleton(config), entries)
    if format == "onnx":
        if dtype != "fp32":
            raise ValueError(
                f"--dtype {dtype}: ONNX files are written in fp32, since few runtimes sample in "
                "less; leave out --dtype and convert the file for the runtime of your choice"
            )
        return _write_onnx(weights, config, folder / ONNX, entries)
    made = formats.layout(format, config, entries, dtype)
    _write_json(folder / "config.json", made.config)
    tensor_file.write(
        folder / WEIGHTS,
        weights,
        made.tensors,
        dtype=dtype,
        metadata={"format": "pt"},
        progress=progress,
    )
    return made.pooling


def _write_onnx(weights: Weights, config: Config, path: Path, entries: dict[str, Entry]) -> bool:
    onnx_file.require_onnx()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        name = config.model.backbone.name
        backbone = build_backbone(name, **config.model.backbone.options)
    state = {name: weights.tensor(entry.kind, entry.name) for name, entry in entries.items()}
    fresh = export.untrained(backbone, state)
    load_weights(backbone, state, fresh=fresh)  # type: ignore[arg-type]
    del state
    onnx_file.write_onnx(backbone, path, config.data.image_size, pooling=not fresh)
    return not fresh


def _skeleton(config: Config) -> Backbone:
    """The backbone without memory for its weights."""
    with torch.device("meta"):
        return build_backbone(config.model.backbone.name, **config.model.backbone.options)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
