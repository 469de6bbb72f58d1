"""Frozen teachers: `model.frozen_teachers` names weights, which become networks that make targets.

The weights say which network they are of: a file of `m3i export`, a folder or Hub name of timm or
transformers; otherwise `architecture` does. Unlike `model.init`, where weights have to fit the
run's backbone, they bring a network of their own.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from m3i_scale.config import Backbone, Config, ConfigError, Data, FrozenTeacher
from m3i_scale.integrations import initial
from m3i_scale.integrations.folders import Stored, open_weights, read_json
from m3i_scale.integrations.foreign import TimmNetwork, TransformersNetwork, vision_config
from m3i_scale.models.backbone import BACKBONE_NAMES, backbone_options, build_backbone
from m3i_scale.models.frozen import FrozenEncoder, Normalisation, Seen
from m3i_scale.models.intern_image import InternImage
from m3i_scale.models.vit import ViT

PREPROCESSOR = "preprocessor_config.json"
_ENLARGED = 32  # times an image's side: what is left over at its edge then shows as patches


class OwnNetwork(nn.Module):
    """A backbone of this project; `pools` where its pooling has been trained."""

    def __init__(self, described: Backbone) -> None:
        super().__init__()
        self.backbone = build_backbone(described.name, **described.options)
        self.pools = True

    def forward(self, images: Tensor) -> Seen:
        """See `Seen`."""
        tokens = self.backbone.features(images)
        grid = self.backbone.grid_size(*images.shape[-2:])
        features = tokens.transpose(1, 2).unflatten(2, grid)
        return Seen(features, self.backbone.pool(tokens) if self.pools else None)


@dataclass(frozen=True)
class Recipe:
    """A network that is described and not yet built.

    title     in a few words
    content   all that it computes depends on besides its weights, as JSON
    build     the network, drawn at random
    fill      copies stored weights in; names and values of those that were used
    """

    title: str
    content: Mapping[str, Any]
    build: Callable[[], nn.Module]
    fill: Callable[[nn.Module], Iterable[tuple[str, Tensor]]]


class Opened(NamedTuple):
    """Weights, the network they are of, and how it wants images."""

    name: str
    spec: FrozenTeacher
    stored: Stored
    recipe: Recipe
    normal: Normalisation
    normal_of: str  # who says so


class Loaded(NamedTuple):
    """A frozen teacher that is ready."""

    encoder: FrozenEncoder
    identity: dict[str, Any]  # what a checkpoint says about it
    line: str  # what a user is told about it


def open_all(config: Config) -> list[Opened]:
    """`open_frozen` of all that some target asks for."""
    teachers = config.model.frozen_teachers
    names = config.objective.frozen_teachers
    return [open_frozen(name, teachers[name], config.data) for name in names]


def make_skeletons(config: Config) -> dict[str, FrozenEncoder]:
    """`make_skeleton` of the same, to count with."""
    return {source.name: make_skeleton(source, config.data) for source in open_all(config)}


def open_frozen(name: str, spec: FrozenTeacher, data: Data) -> Opened:
    """Find weights, and out what network they are of; nothing large is read.

    Args:
        name: of the teacher, in the configuration.
        spec: its section.
        data: the run's, whose normalisation a network has that does not say its own.

    Raises:
        ConfigError: there are no such weights, or nobody says what they are of.
    """
    try:
        stored = open_weights(spec.source, also=[PREPROCESSOR])
        recipe = _own(spec, stored) or _of_timm(spec, stored) or _of_transformers(spec, stored)
        if recipe is None:
            raise ValueError(
                f"{stored.path} does not say which network it is of; set "
                f"model.frozen_teachers.{name}.architecture to a model of timm or a backbone "
                f"({', '.join(BACKBONE_NAMES)}), and options to its arguments"
            )
        normal, said = _normalisation(spec, stored, recipe, data)
    except ValueError as error:
        raise ConfigError(f"model.frozen_teachers.{name}: {error}") from error
    return Opened(name, spec, stored, recipe, normal, said)


def make_skeleton(source: Opened, data: Data) -> FrozenEncoder:
    """The network without weights, on the meta device, with the widths of what it gives.

    Raises:
        ConfigError: it cannot be built, or takes no images of this size.
    """
    size = source.spec.image_size or data.image_size
    try:
        with torch.device("meta"):
            network, tried = source.recipe.build(), source.recipe.build().eval()
        widths = _try(source, tried, size)
    except ValueError as error:
        raise ConfigError(f"model.frozen_teachers.{source.name}: {error}") from error
    return _wrapped(source, network, data, widths)


def load(source: Opened, data: Data, device: torch.device, dtype: torch.dtype) -> Loaded:
    """The network with its weights, which is drawn from no generator that anybody else uses.

    Raises:
        ConfigError: the weights do not fit.
    """
    made, digest = make_skeleton(source, data), hashlib.sha256()
    with torch.random.fork_rng(devices=[]):
        network = source.recipe.build()
        try:
            used = sorted(source.recipe.fill(network))
        except ValueError as error:
            where = f"model.frozen_teachers.{source.name}: {source.stored.path}"
            raise ConfigError(f"{where}: {error}") from error
    for name, tensor in used:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    encoder = _wrapped(source, network, data, _Widths(made.width, made.pooled_width))
    identity = {
        "sha256": digest.hexdigest(),
        "network": json.dumps(source.recipe.content, sort_keys=True),
        "image_size": source.spec.image_size,
        "mean": list(source.normal.mean),
        "std": list(source.normal.std),
    }
    return Loaded(encoder.to(device, dtype), identity, _line(source, encoder))


def _line(source: Opened, encoder: FrozenEncoder) -> str:
    count = sum(p.numel() for p in encoder.parameters())
    size = f"images of {encoder.image_size} pixels, " if encoder.image_size else ""
    return (
        f"frozen teacher {source.name}: {source.recipe.title} from {source.stored.path}, "
        f"{count / 1e6:.3f} M weights; {size}{encoder.width} features, normalisation of "
        f"{source.normal_of}"
    )


# ------------------------------------------------------------------------------------ the networks


def _own(spec: FrozenTeacher, stored: Stored) -> Recipe | None:
    described = _own_backbone(spec, stored)
    if described is None:
        return None
    start = initial.check(spec.source, stored, _Start(described, spec.source))
    with torch.device("meta"):
        backbone = build_backbone(described.name, **described.options)
    modules = dict(backbone.named_modules())  # type: ignore[attr-defined]
    pooling = next(name for name, module in modules.items() if module is backbone.pooling)
    new = [name for name in start.new if not name.startswith(f"{pooling}.")]
    if new:
        raise ValueError(
            f"{stored.path} has no weights of {new[0].partition('.')[0]}, without which the "
            f"features of {described.name} mean nothing; take an export of a run, or a published "
            "InternImage-H or G"
        )

    def build() -> nn.Module:
        network = OwnNetwork(described)
        network.pools = not start.new
        return network

    def fill(network: nn.Module) -> Iterable[tuple[str, Tensor]]:
        assert isinstance(network, OwnNetwork)
        initial.load(network.backbone, start)  # type: ignore[arg-type]
        return ((name, start.tensor(name)) for name in start.names)

    return Recipe(described.name, described.model_dump(mode="json"), build, fill)


class _Start(NamedTuple):
    """As `initial.Starts`."""

    backbone: Backbone
    init: str | None


def _own_backbone(spec: FrozenTeacher, stored: Stored) -> Backbone | None:
    """The backbone of this project that the weights are of; None for other networks."""
    if spec.architecture is not None:
        if spec.architecture not in BACKBONE_NAMES:
            return None
        return Backbone(name=spec.architecture, options=spec.options)
    config = stored.config
    if "backbone" in stored.metadata:  # of `m3i export`
        described = Backbone.model_validate_json(stored.metadata["backbone"])
        own = {**described.options, **spec.options}
        rows = initial.trained_grid(stored)
        if rows is not None and backbone_options(described.name, own)[0] is ViT:
            own = {"position_grid": rows} | own  # its positions, at whatever size it sees images
        return Backbone(name=described.name, options=own)
    architecture = str(config.get("architecture", ""))
    if architecture in BACKBONE_NAMES:
        given = config.get("model_args") or {}
    elif config.get("model_type") == "internimage":
        architecture, given = "intern_image", config
    else:
        return None
    known = inspect.signature(InternImage).parameters.keys() - {"num_classes", "use_clip_projector"}
    options = {name: value for name, value in given.items() if name in known}
    return Backbone(name=architecture, options={**options, **spec.options})


def _of_timm(spec: FrozenTeacher, stored: Stored) -> Recipe | None:
    architecture = spec.architecture or stored.config.get("architecture")
    if architecture is None:
        return None
    told = {} if spec.architecture else stored.config.get("model_args") or {}
    arguments = {**told, **spec.options}
    return Recipe(
        title=f"timm's {architecture}",
        content={"timm": architecture, "arguments": arguments},
        build=lambda: TimmNetwork(str(architecture), arguments),
        fill=lambda network: _filled(network, stored),
    )


def _of_transformers(spec: FrozenTeacher, stored: Stored) -> Recipe | None:
    if "model_type" not in stored.config:
        return None
    config = vision_config({**stored.config, **spec.options})
    content = {k: v for k, v in config.to_dict().items() if k not in _VOLATILE and k[:1] != "_"}
    return Recipe(
        title=f"transformers' {config.model_type}",
        content={"transformers": config.model_type, "config": content},
        build=lambda: TransformersNetwork(config, stored.entries),
        fill=lambda network: _filled(network, stored),
    )


# Of no meaning for what a network computes.
_VOLATILE = {
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "id2label",
    "label2id",
}


def _filled(network: Any, stored: Stored) -> Iterable[tuple[str, Tensor]]:
    state = {name: entry.load() for name, entry in stored.entries.items()}
    used = network.fill(state)
    return ((name, state[name]) for name in used)


# ---------------------------------------------------------------------------- what it wants to see


def _normalisation(
    spec: FrozenTeacher, stored: Stored, recipe: Recipe, data: Data
) -> tuple[Normalisation, str]:
    """Mean and standard deviation of its images, and who says so."""
    found = list(_told(stored, recipe))
    for mean, std, said in [(spec.mean, spec.std, "the configuration"), *found]:
        if mean is None and std is None:
            continue
        if not (_is_triple(mean) and _is_triple(std) and all(v > 0 for v in std)):
            raise ValueError(f"{said} has mean {mean} and std {std}; give three numbers of both")
        return Normalisation(tuple(mean), tuple(std)), said
    return Normalisation(data.mean, data.std), "data (its weights do not say any)"


def _told(stored: Stored, recipe: Recipe) -> Iterable[tuple[Any, Any, str]]:
    if "config" in stored.metadata:  # of `m3i export`
        run = json.loads(stored.metadata["config"]).get("data", {})
        yield run.get("mean"), run.get("std"), "the exported run"
    pretrained = stored.config.get("pretrained_cfg") or {}
    yield pretrained.get("mean"), pretrained.get("std"), "its config.json"
    file = stored.path / PREPROCESSOR
    if file.is_file():
        content = read_json(file)
        yield content.get("image_mean"), content.get("image_std"), f"its {PREPROCESSOR}"
    if "timm" in recipe.content:
        import timm

        known = timm.get_pretrained_cfg(recipe.content["timm"])
        if known is not None:
            yield known.mean, known.std, "timm"


def _is_triple(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(isinstance(number, int | float) for number in value)
    )


# --------------------------------------------------------------------------------------- to try it


class _Widths(NamedTuple):
    """Channels of what a network gives."""

    tokens: int
    pooled: int | None


def _try(source: Opened, network: nn.Module, size: int) -> _Widths:
    """What a network on the meta device makes of images of a size, in pixels.

    Raises:
        ValueError: it does not take them, or its patches do not cover them whole.
    """
    key = f"model.frozen_teachers.{source.name}.image_size"
    if isinstance(network, OwnNetwork):
        backbone = network.backbone
        try:
            backbone.grid_size(size, size)
        except ValueError as error:
            raise ValueError(f"{error}; set {key} to a multiple") from None
        return _Widths(backbone.width, backbone.embed_dim if network.pools else None)
    # Fake tensors and not those of the meta device, which has no autocast.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        network.to_empty(device="cpu")
        try:
            seen: Seen = network(torch.empty(2, 3, size, size))
            width, columns = seen.map.shape[1], seen.map.shape[3]
        except Exception as error:  # whatever a network says of a size that it does not take
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{source.recipe.title} takes no images of {size} pixels ({reason}); set {key} to "
                "a size it takes"
            ) from None
        stride = _stride(network, size, columns)
    if stride is not None:
        raise ValueError(
            f"images of {size} pixels are no whole number of {source.recipe.title}'s patches of "
            f"{stride}; set {key}={max(1, round(size / stride)) * stride}"
        )
    return _Widths(width, None if seen.pooled is None else seen.pooled.shape[1])


def _stride(network: nn.Module, size: int, columns: int) -> int | None:
    """Pixels of a patch, where patches leave out a part of images of this size; else None."""
    large = size * _ENLARGED
    try:
        many = network(torch.empty(1, 3, large, large)).map.shape[3]
    except Exception:  # it takes one size alone, which is then this one
        return None
    return None if many == columns * _ENLARGED else max(1, round(large / many))


def _wrapped(source: Opened, network: nn.Module, data: Data, widths: _Widths) -> FrozenEncoder:
    return FrozenEncoder(
        network,
        Normalisation(data.mean, data.std),
        source.normal,
        # One size, whatever that of a step is.
        image_size=source.spec.image_size or (data.image_size if data.mixed_sizes else None),
        width=widths.tokens,
        pooled_width=widths.pooled,
    )
