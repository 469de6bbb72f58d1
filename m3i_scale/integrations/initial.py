"""What a run starts from: `model.init` names weights, which become those of the backbone.

A file of `m3i export`, a published InternImage, a folder of timm or transformers, or a name on the
Hub. What the backbone has and the weights do not keeps its initialisation only as a whole part that
other training does not have (the fused map and the pooling, the last norm of a ViT); everything
else must fit, by name, shape and the options that shapes do not show.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from m3i_scale.config import Backbone, ConfigError
from m3i_scale.integrations import vit_names
from m3i_scale.integrations.folders import Entry, Stored, open_weights
from m3i_scale.integrations.foreign import build_timm
from m3i_scale.models.backbone import backbone_options, build_backbone, with_defaults
from m3i_scale.models.intern_image import INTERN_IMAGE_VARIANTS, InternImage
from m3i_scale.models.weights import plain_name

WHOLE = "student.backbone."  # of the backbone in a file of all networks
# Parts that may be in the backbone alone, and parts that may be in the weights alone.
_NEW = {
    "intern_image": ("dcnv3_head_x3", "dcnv3_head_x4", "clip_projector"),
    "vit": ("attention_pool", "norm"),
}
_LEFT = {
    "intern_image": ("conv_head", "head", "fc_norm"),
    "vit": (
        "head", "fc_norm", "attn_pool", "pooler", "decoder", "cls_token", "reg_token",
        "mask_token", "pos_embed",
    ),
}  # fmt: skip
# Arguments that say how a network trains or computes, or what names and shapes show.
_FREE = {
    "drop_path_rate", "drop_path_type", "checkpoint_blocks", "fused_offset_branch", "half_blend",
    "num_classes", "use_clip_projector", "layer_scale", "position_grid",
}  # fmt: skip
_OF_POOLING = ("clip_", "pool_", "embed_dim")  # begin the names of arguments of the pooling


@dataclass(frozen=True)
class Initial:
    """Weights for a backbone, checked against it and not yet read.

    source    as the configuration says it
    stored    where they lie
    entries   tensors by the backbone's names
    new       names in the backbone that the weights do not have
    left      names in the weights that the backbone does not have
    notes     what else to know, sentence by sentence
    """

    source: str
    stored: Stored
    entries: Mapping[str, Entry]
    new: Sequence[str]
    left: Sequence[str]
    notes: Sequence[str]

    @property
    def names(self) -> Iterable[str]:
        """Parameters of the backbone that there are weights for."""
        return self.entries.keys()

    def tensor(self, name: str) -> Tensor:
        """The weights of one parameter, float32 on the CPU."""
        return self.entries[name].load().float()

    def part(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` of the same, flattened; averages start with the weights."""
        return self.tensor(name).flatten()[start:stop]

    def lines(self) -> list[str]:
        """The report of what is loaded and what is new."""
        elements = sum(torch.Size(entry.shape).numel() for entry in self.entries.values())
        lines = [f"loaded {len(self.entries)} tensors, {elements / 1e6:.3f} M weights"]
        lines += [f"new: {_parts(self.new)}"] if self.new else []
        lines += [f"left out of the file: {_parts(self.left)}"] if self.left else []
        return [*lines, *self.notes]

    def record(self) -> dict[str, Any]:
        """The same for a file, with the digests of the files that were read."""
        files = {str(path): _digest(path) for path in self.stored.files}
        return {
            "init": self.source,
            "sha256": files,
            "loaded": sorted(self.entries),
            "new": list(self.new),
            "left": list(self.left),
            "notes": list(self.notes),
        }


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _parts(names: Sequence[str]) -> str:
    counts = Counter(name.partition(".")[0] for name in names)
    return ", ".join(f"{part} ({count})" for part, count in counts.items())


class Starts(Protocol):
    """Networks as configuration that start from weights: pre-training's, or a task's."""

    @property
    def backbone(self) -> Backbone:
        """The image encoder."""
        ...

    @property
    def init(self) -> str | None:
        """What it starts from."""
        ...


def open_initial(model: Starts) -> Initial:
    """Find the weights that `model.init` names and check them against `model.backbone`.

    Raises:
        ConfigError: they do not exist, cannot be read, or do not fit; names are given.
    """
    assert model.init is not None
    try:
        return check(model.init, open_weights(model.init), model)
    except ValueError as error:
        raise ConfigError(f"model.init: {error}") from error


def check(source: str, stored: Stored, model: Starts) -> Initial:
    """As `open_initial`, of opened weights; raises ValueError."""
    name, options = model.backbone.name, model.backbone.options
    build, arguments = backbone_options(name, options)
    kind = "intern_image" if build is InternImage else "vit"
    with torch.device("meta"):
        backbone = build_backbone(name, **options)
    assert isinstance(backbone, nn.Module)
    own = {n: tuple(p.shape) for n, p in backbone.state_dict().items()}
    entries = _named(stored, kind)
    new, left = _fit(f"{stored.path} does not fit the backbone {name}", own, entries, kind)
    _require_options(stored, kind, with_defaults(build, arguments), entries)
    notes = _notes(kind, entries, stored, with_defaults(build, arguments))
    if kind == "vit" and vit_names.has_x_first(entries):
        entries = vit_names.exchange_halves(entries)
    fitting = {n: entry for n, entry in entries.items() if n in own}
    return Initial(source, stored, fitting, new, left, notes)


def load(backbone: nn.Module, initial: Initial) -> None:
    """Copy the weights into a backbone that is whole on one device."""
    own = backbone.state_dict()
    with torch.no_grad():
        for name in initial.names:
            own[name].copy_(initial.tensor(name))


def _named(stored: Stored, kind: str) -> dict[str, Entry]:
    entries = dict(stored.entries)
    if any(name.startswith(WHOLE) for name in entries):
        entries = {n.removeprefix(WHOLE): e for n, e in entries.items() if n.startswith(WHOLE)}
    if kind == "vit":
        return vit_names.timm_entries(entries)
    return {plain_name(name): entry for name, entry in entries.items()}


def _fit(
    fault: str, own: Mapping[str, tuple[int, ...]], entries: Mapping[str, Entry], kind: str
) -> tuple[list[str], list[str]]:
    """What is new and what is left out; ValueError for everything else that differs."""

    def whole(part: str) -> bool:
        return not any(_under(name, [part]) for name in entries)

    free = [part for part in _NEW[kind] if whole(part)]
    new = [name for name in own if name not in entries and _under(name, free)]
    left = [name for name in entries if name not in own and _under(name, _LEFT[kind])]
    faults = {
        "missing": [name for name in own if name not in entries and name not in new],
        "unknown": [name for name in entries if name not in own and name not in left],
        "of another shape": [
            f"{name} {entries[name].shape} for {own[name]}"
            for name in own
            if name in entries and entries[name].shape != own[name]
        ],
    }
    said = [f"{len(names)} {what}: {_few(names)}" for what, names in faults.items() if names]
    if said:
        raise ValueError(
            f"{fault}; {'; '.join(said)}; set model.backbone to the network of these weights"
        )
    return new, left


def _under(name: str, parts: Iterable[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _described(stored: Stored, kind: str) -> dict[str, Any]:
    """What the weights say about their network: arguments of the backbone, where they are known."""
    config = stored.config
    if "backbone" in stored.metadata:  # of `m3i export`
        described = Backbone.model_validate_json(stored.metadata["backbone"])
        return with_defaults(*backbone_options(described.name, described.options))
    if kind == "intern_image" and config.get("model_type") == "internimage":
        return with_defaults(InternImage, config)
    architecture = str(config.get("architecture", ""))
    if kind == "intern_image" and architecture.startswith("intern_image"):
        size = architecture.removeprefix("intern_image").removeprefix("_") or "t"
        named = INTERN_IMAGE_VARIANTS.get(size, {})
        return with_defaults(InternImage, {**named, **config.get("model_args", {})})
    if kind == "vit" and "num_attention_heads" in config:
        return {"heads": config["num_attention_heads"]}
    if kind == "vit" and architecture:
        return {"heads": _timm_heads(architecture, config.get("model_args") or {})}
    return {}


def _timm_heads(architecture: str, arguments: Mapping[str, Any]) -> int:
    try:
        with torch.device("meta"):
            model: Any = build_timm(architecture, arguments)
        return int(model.blocks[0].attn.num_heads)
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"timm builds no ViT of {architecture!r}: {error}") from None


def _require_options(
    stored: Stored, kind: str, ours: Mapping[str, Any], entries: Mapping[str, Entry]
) -> None:
    """Refuse weights of a network that computes something else with the same shapes."""
    theirs = _described(stored, kind)
    pooled = any(_under(name, ("clip_projector", "attention_pool")) for name in entries)
    differing = [
        f"{name} is {theirs[name]!r} there and {ours[name]!r} in the configuration"
        for name in sorted(ours.keys() & theirs.keys() - _FREE)
        if (pooled or not name.startswith(_OF_POOLING))
        and _plain(theirs[name]) != _plain(ours[name])
    ]
    if differing:
        raise ValueError(
            f"{stored.path} is of another network: {'; '.join(differing)}; set model.backbone to "
            "the network of these weights"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value or None


def trained_grid(stored: Stored) -> int | None:
    """Rows of patches that the ViT of a file of `m3i export` was trained on; None: unknown."""
    if not {"backbone", "config"} <= stored.metadata.keys():
        return None
    described = _described(stored, "vit")
    if described.get("position_grid") is not None:
        return int(described["position_grid"])
    try:
        size = json.loads(stored.metadata["config"])["data"]["image_size"]
        return int(size) // int(described["patch_size"])
    except (LookupError, TypeError, ValueError):
        return None


def _notes(
    kind: str, entries: Mapping[str, Entry], stored: Stored, ours: Mapping[str, Any]
) -> list[str]:
    notes = []
    if kind == "vit":
        rows = trained_grid(stored)
        if rows is not None and ours["position_grid"] != rows:
            notes.append(
                f"it was trained on {rows} x {rows} patches; at another image size set "
                f"model.backbone.options.position_grid={rows}, so that positions are rescaled"
            )
        if "pos_embed" in entries:
            notes.append(vit_names.compare_positions(entries, ours["position_grid"]))
        if "cls_token" in entries:
            notes.append("its class token took part in attention; this ViT has none")
    if not stored.config and "backbone" not in stored.metadata:
        notes.append("the file does not say its options; only names and shapes were compared")
    return notes
