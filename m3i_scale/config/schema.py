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
    Momentum,
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
    """`intern_image_t` to `intern_image_g`, `vit_b16`, or `intern_image`, `vit` with options."""
    options: dict[str, Any] = {}
    """Arguments of the backbone's constructor; they override those that the name stands for."""


class Decoder(Node):
    """Image decoder (Table 7). `head`: how its last layer starts (docs/paper.md: why at zero)."""

    depth: Count = 4
    """Transformer blocks."""
    width: Count = 768
    """Features of a token."""
    heads: Count = 16
    """Attention heads."""
    ffn: Count = 3072
    """Hidden features of each MLP."""
    head: Literal["zero", "xavier"] = "zero"
    """How the last layer starts."""
    checkpoint_blocks: bool = False
    """Recompute blocks in the backward pass to save memory."""


class TextTower(Node):
    """BERT-shaped text encoder and its tokenizer (a tokenizer.json path or a Hub name)."""

    tokenizer: PathText
    """Path of a tokenizer.json (`m3i tokenizer`), or a name on the Hugging Face Hub."""
    vocab_size: Count = 30522
    """Rows of the embedding: the tokenizer's number of tokens, or more."""
    depth: Count = 12
    """Transformer blocks."""
    width: Count = 768
    """Features of a token."""
    heads: Count = 12
    """Attention heads."""
    ffn: Count = 3072
    """Hidden features of each MLP."""
    max_length: Count = 64
    """Tokens of a caption; longer captions are cut."""
    embed_dim: Count = 768
    """Features of the caption's vector, in which images and texts are compared."""
    checkpoint_blocks: bool = False
    """Recompute blocks in the backward pass to save memory."""


class GlobalHead(Node):
    """Projector and predictor (MLPs) of `global` targets, and of dense ones with a projector.

    Built only where such a target is present; one pair serves all global targets, another all
    dense ones.
    """

    hidden: Count = 4096
    """Hidden features of the MLPs."""
    width: Count = 256
    """Features of projections."""
    predictor: bool = True
    """Whether the student has an MLP behind its projector (BYOL, SimSiam, MoCo v3)."""


class Model(Node):
    """All networks."""

    backbone: Backbone
    """The image encoder."""
    decoder: Decoder = Decoder()
    """The image decoder of dense targets."""
    text: TextTower | None = None
    """The text encoder; needed for text targets."""
    categories: Annotated[int, Field(ge=0)] = 0
    """Number of categories; needed for category targets."""
    global_head: GlobalHead = GlobalHead()
    """Projector and predictor."""


# --------------------------------------------------------------------------------------------- data


class Source(Node):
    """One indexed set of WebDataset shards."""

    name: str
    """Name of the source in logs."""
    index: PathText
    """Path or URL of the index (`m3i shards index`)."""
    kind: Literal["text", "category", "both"]
    """The supervision that every sample of the source carries."""
    weight: Positive | None = None
    """Share of the stream, relative to the other weights. null: samples times `epochs`."""
    epochs: Positive = 1.0
    """How often the source is shown while sources with `epochs: 1` are shown once."""


class Photometric(Node):
    """Photometric strengths of one view, as `m3i_scale.data.views.Photometric`."""

    jitter_probability: Fraction = 0.8
    """Of changing brightness, contrast, saturation and hue."""
    brightness: Fraction = 0.4
    """Largest relative change."""
    contrast: Fraction = 0.4
    """Largest relative change."""
    saturation: Fraction = 0.2
    """Largest relative change."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Largest shift, as a share of the colour circle."""
    grayscale_probability: Fraction = 0.2
    """Of removing colour."""
    blur_probability: Fraction = 0.5
    """Of a Gaussian blur."""
    blur_sigma: tuple[Positive, Positive] = (0.1, 2.0)
    """Smallest and largest sigma of the blur, in pixels."""
    solarize_probability: Fraction = 0.0
    """Of inverting bright pixels."""
    solarize_threshold: float = 128.0
    """Values from here on count as bright, of 0 to 255."""


class Augmentation(Node):
    """How two views are made of an image (Table 7 names the operations).

    Photometric strengths are BYOL's; the crop scale is MoCo v2's (BYOL's begins at 0.08).
    """

    scale: tuple[Positive, Fraction] = (0.2, 1.0)
    """Smallest and largest share of the image's area that a crop covers."""
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a crop."""
    flip_probability: Fraction = 0.5
    """Of a horizontal flip."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How crops are resized."""
    views: Literal[1, 2] = 2
    """Views of each image. 1 where the objective uses a single view: less to decode and crop."""
    view_a: Photometric = Photometric(blur_probability=1.0)
    """Colours of view a, which the input shows."""
    view_b: Photometric = Photometric(blur_probability=0.1, solarize_probability=0.2)
    """Colours of view b."""


class Storage(Node):
    """How shards are read, as `m3i_scale.data.Storage`."""

    retries: Annotated[int, Field(ge=0)] = 4
    """Further attempts to read a range, with growing pauses."""
    cache: PathText | None = None
    """Folder of a disk cache of remote shards; null: none."""
    cache_gibibytes: Positive = 93.0
    """Size of the cache; the default is a little less than 100 GB."""
    allow_pipe: bool = False
    """Whether shards named `pipe:COMMAND` may run their command."""
    options: dict[str, Any] = {}
    """Options of the file systems by protocol, for instance {s3: {endpoint_url: ...}}."""


class Data(Node):
    """The stream of images, texts and categories."""

    sources: list[Source] = Field(min_length=1)
    """The indexed data sets, mixed by weight."""
    image_size: Count = 224
    """Side of the views in pixels."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the pixels, RGB from 0 to 1; subtracted."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Standard deviation of the pixels; divided by."""
    augmentation: Augmentation = Augmentation()
    """Crops and colours."""
    workers: Annotated[int, Field(ge=0)] = 8
    """Reading processes of each rank; 0: the training process reads."""
    max_bad_rate: Fraction = 0.01
    """Share of replaced samples, among the last `bad_window` of a rank, above which the run stops.
    """
    bad_window: Count = 10_000
    """Samples over which `max_bad_rate` is measured."""
    max_pixels: Count = 100_000_000
    """Larger images are replaced before they are decoded."""
    lanes: Count | None = None
    """Reading positions of each source, part of the order. null: `optimizer.global_batch_size`."""
    chunk_mebibytes: Positive = 4.0
    """Neighbouring bytes that the order keeps together; part of the order."""
    storage: Storage = Storage()
    """How shards are read."""


# ----------------------------------------------------------------------------------------- training


class Optimizer(Node):
    """AdamW, its schedule, and the teacher's.

    `global_batch_size` stays what it is on any number of ranks: what `max_micro_batch` does not
    take at once is accumulated. A softmax over other samples (`regularisation: negatives`) sees
    those of one micro-step on all ranks, so its negatives become fewer with accumulation.
    `teacher_momentum` is a number or `by_length`: so that the teacher forgets its start seven times
    in the run, however short it is (docs/paper.md).
    """

    global_batch_size: Count
    """Samples of an optimiser step on all ranks together."""
    max_micro_batch: Annotated[int, Field(gt=0, multiple_of=2)]
    """Most samples that a rank computes at once."""
    duration: Span
    """Length of training: `100 steps`, `1e6 samples`, `30 epochs`."""
    warmup: SpanOrZero
    """Length of the linear rise of the learning rate from 0."""
    learning_rate: Positive = 1e-3
    """Peak of the cosine schedule."""
    final_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    """End of the cosine schedule."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """Adam's averaging factors."""
    epsilon: Positive = 1e-8
    """Adam's epsilon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Of weight matrices; biases, norms and temperatures have none."""
    clip_norm: Positive | None = 1.0
    """Largest global norm of the gradient; null: no clipping."""
    teacher_momentum: Momentum = 0.995
    """Share of the old average in the teacher's update, at the beginning; or `by_length`."""
    teacher_momentum_final: Fraction = 1.0
    """The same at the end; a cosine in between."""


class Zero(Node):
    """ZeRO-3 settings with a meaning here; `extra` is merged into DeepSpeed's own configuration."""

    persistence_threshold: Annotated[int, Field(ge=0)] = 100_000
    """Parameters up to this number of elements stay whole on every rank."""
    prefetch_bucket: Count = 50_000_000
    """Elements gathered ahead."""
    reduce_bucket: Count = 200_000_000
    """Elements of gradients reduced at once."""
    max_live_parameters: Count = 1_000_000_000
    """Most gathered elements at a time."""
    hpz_partition: Count = 1
    """Ranks of a second partition inside a node (ZeRO++ hpZ); 1: none."""
    offload_optimizer: bool = False
    """Keep optimiser states in host memory."""
    extra: dict[str, Any] = {}
    """Anything else of DeepSpeed's configuration, merged over what this program writes."""


class Engine(Node):
    """Precision and devices, ZeRO-3, and what happens to unstable and stalled runs."""

    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of computation; master weights stay float32."""
    teacher: Literal["whole", "sharded"] = "whole"
    """Where the teacher's weights are: `whole` on every GPU (2 bytes a parameter in bf16, one all-
    gather a step), or `sharded` by ZeRO-3 like the student's (least memory). Values and
    checkpoints are the same.
    """
    deterministic: bool = False
    """Steps and resumed runs are equal bit for bit on GPUs, too, at some cost in speed; on CPUs
    they always are.
    """
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: GPUs where there are some."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """`auto`: Triton on GPUs, the reference on CPUs."""
    zero: Zero = Zero()
    """ZeRO-3."""
    max_nonfinite_steps: Count = 10
    """Skipped steps in a row, because a gradient is not finite, that make a run unstable."""
    rollbacks: Annotated[int, Field(ge=0)] = 0
    """How often an unstable run may go back to its last good checkpoint by itself."""
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """A loss above this multiple of its average makes a run unstable; null: never."""
    stall_minutes: Positive = 30.0
    """Minutes without a step after which each rank writes its stacks and exits with 87."""
    timeout_minutes: Positive = 60.0
    """Of collectives."""


class Checkpoint(Node):
    """When checkpoints are written and which are kept."""

    every: Span = Duration(1000, "steps")
    """Interval of checkpoints."""
    keep_last: Count = 3
    """How many of the newest stay."""
    keep_every: Span | None = None
    """Checkpoints at these intervals stay for ever; null: none."""
    background: bool = True
    """Write while training continues, from a copy in host memory."""


class Logging(Node):
    """What is written to the run folder, and how often."""

    every: Count = 10
    """Steps between lines on the terminal."""
    tensorboard: bool = True
    """Write TensorBoard curves."""
    pictures: bool = True
    """Draw mixes.png at the start."""


class Config(Node):
    """The whole tree."""

    run: RunName
    """Name of the run: its folder below `folder`."""
    folder: PathText = "runs"
    """Folder of all runs."""
    seed: int = 0
    """Of the weights, the order of the data, and augmentation."""
    model: Model
    """The networks."""
    objective: Objective
    """The input and the target groups."""
    data: Data
    """The stream of samples."""
    optimizer: Optimizer
    """Batch, duration, AdamW, teacher momentum."""
    engine: Engine = Engine()
    """Precision, devices, ZeRO-3, stability."""
    checkpoint: Checkpoint = Checkpoint()
    """When to save, what to keep."""
    logging: Logging = Logging()
    """What is written beside checkpoints."""

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
