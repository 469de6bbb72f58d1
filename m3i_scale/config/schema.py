"""The configuration tree: every key, type and default. `objective.py` has the objective's part.

The package imports nothing else of the project and touches no data, GPU or process group. The tree
refuses an impossible combination with a sentence that says what is wrong and how to mend it;
`load.py` reads it from YAML and from the command line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from m3i_scale.config.objective import Objective

# ruff: noqa: RUF012  (pydantic copies defaults)
from m3i_scale.config.types import (
    BelowOne,
    Count,
    Duration,
    Fraction,
    Node,
    PathText,
    Positive,
    RunName,
    Span,
    SpanOrZero,
)

# -------------------------------------------------------------------------------------------- model


class Backbone(Node):
    """The image encoder by name; `options` go to its constructor, which knows their names."""

    name: str
    options: dict[str, Any] = {}


class Decoder(Node):
    """Image decoder (Table 7)."""

    depth: Count = 4
    width: Count = 768
    heads: Count = 16
    ffn: Count = 3072
    checkpoint_blocks: bool = False


class TextTower(Node):
    """BERT-shaped text encoder and its tokenizer (a tokenizer.json path or a Hub name)."""

    tokenizer: PathText
    vocab_size: Count = 30522
    depth: Count = 12
    width: Count = 768
    heads: Count = 12
    ffn: Count = 3072
    max_length: Count = 64
    embed_dim: Count = 768
    checkpoint_blocks: bool = False


class GlobalHead(Node):
    """Projector and predictor (MLPs) of `global` targets, and of dense ones with a projector.

    Built only where such a target is present; one pair serves all global targets, another all
    dense ones.
    """

    hidden: Count = 4096
    width: Count = 256
    predictor: bool = True


class Model(Node):
    """All networks."""

    backbone: Backbone
    decoder: Decoder = Decoder()
    text: TextTower | None = None
    categories: Annotated[int, Field(ge=0)] = 0
    global_head: GlobalHead = GlobalHead()


# --------------------------------------------------------------------------------------------- data


class Source(Node):
    """One indexed set of WebDataset shards."""

    name: str
    index: PathText
    kind: Literal["text", "category", "both"]
    weight: Positive | None = None
    epochs: Positive = 1.0


class Photometric(Node):
    """Photometric strengths of one view, as `m3i_scale.data.views.Photometric`."""

    jitter_probability: Fraction = 0.8
    brightness: Fraction = 0.4
    contrast: Fraction = 0.4
    saturation: Fraction = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    grayscale_probability: Fraction = 0.2
    blur_probability: Fraction = 0.5
    blur_sigma: tuple[Positive, Positive] = (0.1, 2.0)
    solarize_probability: Fraction = 0.0
    solarize_threshold: float = 128.0


class Augmentation(Node):
    """How two views are made of an image (Table 7 names the operations; strengths are BYOL's)."""

    scale: tuple[Positive, Fraction] = (0.2, 1.0)
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    flip_probability: Fraction = 0.5
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    views: Literal[1, 2] = 2  # 1 where the objective uses a single view: less to decode and crop
    view_a: Photometric = Photometric(blur_probability=1.0)
    view_b: Photometric = Photometric(blur_probability=0.1, solarize_probability=0.2)


class Storage(Node):
    """How shards are read, as `m3i_scale.data.Storage`."""

    retries: Annotated[int, Field(ge=0)] = 4
    cache: PathText | None = None
    cache_gibibytes: Positive = 93.0  # a little less than 100 GB
    allow_pipe: bool = False
    options: dict[str, Any] = {}  # of the file systems, for instance {s3: {endpoint_url: ...}}


class Data(Node):
    """The stream of images, texts and categories."""

    sources: list[Source] = Field(min_length=1)
    image_size: Count = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    augmentation: Augmentation = Augmentation()
    workers: Annotated[int, Field(ge=0)] = 8
    max_bad_rate: Fraction = 0.01  # of replaced samples among bad_window of a rank, else it stops
    bad_window: Count = 10_000
    max_pixels: Count = 100_000_000  # larger pictures are replaced before they are unpacked
    # Lanes of the order, part of its identity. None: optimizer.global_batch_size.
    lanes: Count | None = None
    chunk_mebibytes: Positive = 4.0  # read in one piece; part of the order's identity too
    storage: Storage = Storage()


# ----------------------------------------------------------------------------------------- training


class Optimizer(Node):
    """AdamW, its schedule, and the teacher's.

    `global_batch_size` stays what it is on any number of ranks: what `max_micro_batch` does not
    take at once is accumulated. A softmax over other samples (`regularisation: negatives`) sees
    those of one micro-step on all ranks, so its negatives become fewer with accumulation.
    """

    global_batch_size: Count
    max_micro_batch: Annotated[int, Field(gt=0, multiple_of=2)]
    duration: Span
    warmup: SpanOrZero
    learning_rate: Positive = 1e-3
    final_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    epsilon: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip_norm: Positive | None = 1.0
    teacher_momentum: Fraction = 0.995
    teacher_momentum_final: Fraction = 1.0


class Zero(Node):
    """ZeRO-3 settings with a meaning here; `extra` is merged into DeepSpeed's own configuration."""

    persistence_threshold: Annotated[int, Field(ge=0)] = 100_000
    prefetch_bucket: Count = 50_000_000
    reduce_bucket: Count = 200_000_000
    max_live_parameters: Count = 1_000_000_000
    hpz_partition: Count = 1
    offload_optimizer: bool = False
    extra: dict[str, Any] = {}


class Engine(Node):
    """How it is run.

    `teacher`: the teacher's weights, whole on every GPU (2 bytes a parameter in bf16, one
    all-gather a step) or sharded by ZeRO-3 like the student's (least memory; gathered block by
    block whenever it runs). Values and checkpoints are the same. `deterministic`: steps and resumed
    runs are equal bit for bit on GPUs too, at some cost in speed (on CPUs they always are).
    """

    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    teacher: Literal["whole", "sharded"] = "whole"
    deterministic: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    kernels: Literal["auto", "triton", "reference"] = "auto"
    zero: Zero = Zero()
    max_nonfinite_steps: Count = 10
    rollbacks: Annotated[int, Field(ge=0)] = 0  # how often an unstable run may go back by itself
    spike_factor: Annotated[float, Field(gt=1)] | None = None  # loss over its average: unstable
    stall_minutes: Positive = 30.0  # without a step: write all stacks and end
    timeout_minutes: Positive = 60.0  # of collectives


class Checkpoint(Node):
    """When checkpoints are written and which are kept."""

    every: Span = Duration(1000, "steps")
    keep_last: Count = 3
    keep_every: Span | None = None
    background: bool = True


class Logging(Node):
    """What is written to the run folder, and how often."""

    every: Count = 10
    tensorboard: bool = True
    pictures: bool = True


class Config(Node):
    """The whole tree."""

    run: RunName
    folder: PathText = "runs"
    seed: int = 0
    model: Model
    objective: Objective
    data: Data
    optimizer: Optimizer
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()

    @property
    def run_folder(self) -> Path:
        """Where everything about this run is written."""
        return Path(self.folder) / self.run

    @property
    def unsupplied(self) -> set[str]:
        """Those of "text" and "category" that targets ask for and no data source has."""
        kinds = {source.kind for source in self.data.sources}
        supplied = {"text", "category"} if "both" in kinds else kinds
        return (self.objective.representations & {"text", "category"}) - supplied

    @model_validator(mode="after")
    def _possible(self) -> Config:
        if self.objective.without_source == "drop":
            objective = self.objective.without(self.unsupplied)
            return self.model_copy(update={"objective": objective})._checked()
        return self._checked()

    def _checked(self) -> Config:
        if self.unsupplied:
            kind = min(self.unsupplied)
            raise ValueError(
                f"the objective has a {kind} target but no data source of kind {kind}; add one to "
                "data.sources, remove the target, or set objective.without_source: drop"
            )
        wanted = self.objective.representations
        if "text" in wanted and self.model.text is None:
            raise ValueError("a text target needs a text tower; set model.text.tokenizer")
        if "category" in wanted and not self.model.categories:
            raise ValueError("a category target needs model.categories; set their number")
        if self.data.augmentation.views == 1 and self.objective.two_views:
            raise ValueError(
                "the objective compares two views of an image; set data.augmentation.views: 2, or "
                "view: same in all targets"
            )
        if self.data.image_size % self.objective.input.patch:
            raise ValueError(
                f"data.image_size {self.data.image_size} is not a multiple of "
                f"objective.input.patch {self.objective.input.patch}"
            )
        return self
