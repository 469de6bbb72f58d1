"""A linear probe (Table 9 of arXiv 2211.09807): a linear classifier on a frozen backbone.

The backbone lies outside of ZeRO and of checkpoints. It runs in every step on crops of its images,
or, with `data.features`, once before training.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m3i_scale.cluster.launch import World, drawing
from m3i_scale.config import ConfigError
from m3i_scale.config.classification import Classification, Classifier
from m3i_scale.data.map_stream import MapDataset, MapStream, Placed
from m3i_scale.engine.agreement import flat
from m3i_scale.engine.schedules import BatchSplit
from m3i_scale.integrations.initial import Initial, load, open_initial
from m3i_scale.models.backbone import Backbone, build_backbone
from m3i_scale.models.layers import Linear
from m3i_scale.models.precision import DTYPES
from m3i_scale.models.stochastic_depth import hash_keys
from m3i_scale.objective.figures import figure
from m3i_scale.profiling.record import ROWS, Frozen, Sketch, Trace
from m3i_scale.profiling.trace import without_checkpointing
from m3i_scale.tasks.classification.features import (
    CachedSet,
    Encode,
    compute,
    content_of,
    open_folder,
)
from m3i_scale.tasks.classification.images import LabelledSet
from m3i_scale.tasks.classification.networks import Inputs
from m3i_scale.tasks.classification.task import (
    ClassificationTask,
    test_transform,
    training_transform,
)
from m3i_scale.tasks.transfer import PREFIX, empty_images

log = logging.getLogger(__name__)


class Probe(nn.Module):
    """A linear classifier of pooled features.

    Args:
        spec: the networks.
        width: E, of the features.
        backbone: whole and frozen, outside of the tree of modules; None: inputs are features.
        normalised: features are standardised already, and have no layer norm.
    """

    def __init__(
        self, spec: Classifier, width: int, backbone: nn.Module | None, *, normalised: bool = False
    ) -> None:
        super().__init__()
        self.frozen = {} if backbone is None else {"backbone": backbone}
        self._attention = spec.pooling == "attention"
        self.norm: nn.Module = nn.Identity()
        if not normalised:
            self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.dropout = nn.Dropout(spec.dropout)
        self.head = Linear(width, spec.classes)

    def scores(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), or features (B, E), -> scores (B, C)."""
        backbone = self.frozen.get("backbone")
        pooled = images if backbone is None else pool(backbone, images, attention=self._attention)
        return self.head(self.dropout(self.norm(pooled)))

    def forward(self, inputs: Inputs | Tensor) -> dict[str, Tensor]:
        """As of `ClassificationNetworks`."""
        if isinstance(inputs, Tensor):
            return {"scores": self.scores(inputs)}
        loss = F.cross_entropy(self.scores(inputs.images).float(), inputs.targets)
        return {"loss": loss, "loss/classification": figure(loss)}


def pool(backbone: nn.Module, images: Tensor, *, attention: bool) -> Tensor:
    """Images (B, 3, H, W) -> pooled features (B, E), by attention or as the mean of tokens."""
    network = cast(Backbone, backbone)
    tokens = network.features(images)
    return network.pool(tokens) if attention else tokens.mean(1)


class ProbeTask(ClassificationTask):
    """Classification with a frozen backbone."""

    def __init__(self, config: Classification) -> None:
        super().__init__(config)
        self._features = config.data.features
        self.precomputes = self._features is not None
        self._backbone: nn.Module | None = None  # of every step

    # ---------------------------------------------------------------------- before the first step

    @property
    def init(self) -> str | None:
        """None: what the engine trains, and its checkpoints hold, is drawn."""
        return None

    def networks(self) -> Probe:
        """A linear classifier."""
        spec, features = self.config.model, self._features
        normalised = features is not None and features.standardise
        return Probe(spec, self._width, self._backbone, normalised=normalised)

    def leaves(self, networks: Probe) -> Iterable[nn.Module]:
        """None: there is the classifier alone."""
        return ()

    def rate_factors(self, networks: nn.Module) -> Mapping[str, float]:
        """None: layers are those of a backbone."""
        return {}

    @functools.cached_property
    def _width(self) -> int:
        """E."""
        spec = self.config.model
        with torch.device("meta"):
            backbone = build_backbone(spec.backbone.name, **spec.backbone.options)
        return backbone.embed_dim if spec.pooling == "attention" else backbone.width

    @functools.cached_property
    def _initial(self) -> Initial | None:
        model = self.config.model
        return None if model.init is None else open_initial(model)

    @functools.cached_property
    def _weights(self) -> dict[str, Any]:
        """What the backbone's weights are: the files' digests, and the seed of what is drawn."""
        initial, seed = self._initial, self.config.seed
        if initial is None:
            return {"drawn": seed}
        drawn = {"drawn": seed} if initial.new else {}
        return {"sha256": sorted(initial.record()["sha256"].values()), **drawn}

    def load_frozen(self, device: torch.device) -> dict[str, str]:
        """The backbone, unless its features are read from disk."""
        try:
            assert self._width  # the backbone can be built
            if self._features is None:
                self._backbone = self._load_backbone(device)
        except ValueError as error:
            raise ConfigError(f"model.backbone: {error}") from error
        return {"model.init": str(self._weights)}

    def _load_backbone(self, device: torch.device) -> nn.Module:
        model, dtype = self.config.model, DTYPES[self.config.engine.precision]
        with drawing(self.config.seed, torch.device("cpu")):
            backbone = cast(
                nn.Module, build_backbone(model.backbone.name, **model.backbone.options)
            )
        if self._initial is not None:
            load(backbone, self._initial)
            log.info("frozen backbone: %s", self._loaded())
        return backbone.requires_grad_(False).eval().to(device, dtype)

    def _loaded(self) -> str:
        assert self._initial is not None
        return f"{self.config.model.init}: {'; '.join(self._initial.lines())}"

    def notes(self, networks: Any, split: BatchSplit, ranks: int, total: int) -> Iterator[str]:
        """What the backbone's weights are, and what is computed first."""
        drawn = "no model.init, the backbone is drawn"
        yield f"frozen backbone: {drawn if self._initial is None else self._loaded()}"
        if self._features is not None:
            views = max(self._features.views, 1)
            yield f"features of {views} views, kept in {self._features.folder}"

    def statement(self, sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """With the optimiser, the weights, and how features are made."""
        stated = super().statement(sources) | flat("model.init", self._weights)
        stated["optimizer.kind"] = self.config.optimizer.kind
        if self._features is not None:
            made = self._features.model_dump(include={"views", "standardise"})
            stated |= flat("data.features", made)
        return stated

    # ------------------------------------------------------------------------------------ features

    def open_stream(self) -> MapStream:
        """Training images, or their features."""
        if self._features is None:
            return super().open_stream()
        assert len(self.test_set)
        return self.stream_of(self._train_features)

    @functools.cached_property
    def _train_features(self) -> CachedSet:
        data, views = self.config.data, self._given.views
        transform = training_transform(data) if views else test_transform(data)
        return self._cached(self._open("train", transform), "train", max(views, 1))

    @functools.cached_property
    def test_set(self) -> MapDataset:  # type: ignore[override]
        """What is tested on: images, or their features."""
        images = self._open("test", test_transform(self.config.data))
        return images if self._features is None else self._cached(images, "test", 1)

    @property
    def _given(self) -> Any:
        assert self._features is not None
        return self._features

    def _cached(self, images: LabelledSet, name: str, views: int) -> CachedSet:
        dtype = DTYPES[self.config.engine.precision]
        try:
            return CachedSet(images, name, views, self._width, dtype, self.config.seed)
        except ValueError as error:
            raise ConfigError(f"model.backbone: {error}") from error

    def precompute(self, world: World, stopping: Callable[[], bool]) -> None:
        """The features that are not on disk yet."""
        train, test = self._train_features, cast(CachedSet, self.test_set)
        parent = Path(self._given.folder).expanduser()
        content: dict[str, Any] = {}
        if world.is_main:
            content = self._content()
        folder = open_folder(parent, content, world)
        train.folder = test.folder = folder
        compute(
            [train, test], lambda: self._encoder(world), world,
            batch=self._given.batch, stopping=stopping,
        )  # fmt: skip
        if self._given.standardise:
            train.statistics = test.statistics = train.measure()

    def _content(self) -> dict[str, Any]:
        """All that decides the features, as JSON."""
        config, tree = self.config, self.config.data.model_dump(mode="json")
        made = ("image_size", "test_crop", "mean", "std", "max_pixels")
        content: dict[str, Any] = {
            "backbone": config.model.backbone.model_dump(mode="json"),
            "weights": self._weights,
            "pooling": config.model.pooling,
            "precision": config.engine.precision,
            "train": content_of(self._train_features.images),
            "test": content_of(cast(CachedSet, self.test_set).images),
            **{key: tree[key] for key in made},
        }
        if self._given.views:
            content |= {"views": self._given.views, "seed": config.seed}
            content["augmentation"] = tree["augmentation"]
        return content

    def _encoder(self, world: World) -> Encode:
        backbone = self._load_backbone(world.device)
        attention = self.config.model.pooling == "attention"
        dtype = DTYPES[self.config.engine.precision]

        @torch.no_grad()
        def encode(images: Tensor) -> Tensor:
            return pool(backbone, images.to(world.device, dtype), attention=attention).cpu()

        return encode

    # -------------------------------------------------------------------------------- around a step

    def prepare(self, batch: Placed, world: World) -> Inputs:
        """As of fine-tuning; features are not mixed."""
        if self._features is None:
            return super().prepare(batch, world)
        data, spec = batch.to(world.device), self.config
        classes, smoothing = spec.model.classes, spec.data.augmentation.label_smoothing
        targets = F.one_hot(data.batch.labels, classes) * (1 - smoothing) + smoothing / classes
        images = data.batch.images.to(DTYPES[spec.engine.precision])
        return Inputs(images, targets, hash_keys(data.position, spec.seed))

    # ------------------------------------------------------------------------------------ planning

    def flops(self) -> float:
        """Of the backbone's forward pass, or of the classifier where features are on disk."""
        if self._features is None:
            return super().flops()
        return 6.0 * self._width * self.config.model.classes

    def sketch(self) -> Sketch:
        """The whole loss."""
        config, size = self.config, self.config.data.image_size
        backbone = without_checkpointing(config.model.backbone)
        model = config.model.model_copy(update={"backbone": backbone})

        def build() -> Probe:
            if self._features is not None:
                return Probe(model, self._width, None, normalised=self._features.standardise)
            frozen = cast(nn.Module, build_backbone(backbone.name, **backbone.options))
            networks = Probe(model, self._width, frozen.requires_grad_(False))
            networks.add_module("backbone", frozen)  # so that the trace sees it
            return networks

        def run(networks: Probe) -> object:
            keys, targets = torch.empty(ROWS, dtype=torch.int64), torch.empty(ROWS, model.classes)
            images = empty_images(config, size, size)
            if self._features is not None:
                images = torch.empty(ROWS, self._width, dtype=images.dtype)
            return networks.forward(Inputs(images, targets, keys))

        title = f"{backbone.name}, {size} pixels"
        notes = []
        if self._features is not None:
            title = f"features of {title}"
            notes = [f"the features are on disk; they take {max(self._features.views, 1)} forward "
                     "passes over the training images, once"]  # fmt: skip
        return self.sketched(title, build, run, notes)

    def trace(self, *, kernels: bool) -> Trace:
        """The backbone lies outside of ZeRO."""
        found = super().trace(kernels=kernels)
        frozen = [weight for weight in found.weights if weight.name.startswith(PREFIX)]
        if frozen:
            elements = sum(weight.elements for weight in frozen)
            found.frozen["backbone"] = Frozen(elements, self._width, None)
            found.weights = [weight for weight in found.weights if weight not in frozen]
        return found
