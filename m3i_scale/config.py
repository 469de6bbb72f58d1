"""The configuration: one strict, typed, immutable tree. Every key, type and default stands here.

A leaf module: it imports nothing of the project, and touches no data, GPU or process group. An
impossible combination is refused here, with a sentence that says what is wrong and how to mend it;
`config_file.py` reads the tree from YAML and from the command line.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    model_validator,
)


class ConfigError(ValueError):
    """The configuration cannot be used; the message is one sentence for the user.

    `for_users` marks exceptions whose message is all that a user needs: no traceback is shown.
    """

    for_users = True


class Duration(typing.NamedTuple):
    """A length of training, stated once in the unit its author thinks in."""

    amount: float
    unit: str  # "steps", "samples" or "epochs"

    def steps(self, *, batch: int, epoch_samples: int) -> int:
        """Convert to optimiser steps of `batch` samples; an epoch is `epoch_samples` samples."""
        samples = {"steps": batch, "samples": 1, "epochs": epoch_samples}[self.unit]
        return math.ceil(self.amount * samples / batch)

    def __str__(self) -> str:
        return f"{self.amount:g} {self.unit}"


def _parse_duration(value: object) -> Duration:
    if isinstance(value, Duration):
        return value
    match = re.fullmatch(r"\s*([0-9.eE+]+)\s*(step|sample|epoch)s?\s*", str(value))
    if match is None:
        raise ValueError(
            f"{value!r} is not a duration; write '100 steps', '30 epochs', '1e6 samples'"
        )
    return Duration(float(match[1]), match[2] + "s")


Span = Annotated[Duration, BeforeValidator(_parse_duration), PlainSerializer(str)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


class Node(BaseModel):
    """Base of all configuration classes: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


# ---------------------------------------------------------------------------------------- objective


class Gaussian(Node):
    """`||z - z_hat||^2 / (2 sigma^2)`, averaged or summed over the feature dimensions."""

    form: Literal["gaussian"] = "gaussian"
    sigma: Positive = 0.5**0.5
    over_dimensions: Literal["mean", "sum"] = "mean"


class Boltzmann(Node):
    """`-log softmax(z_hat . z / tau)` over the other targets."""

    form: Literal["boltzmann"] = "boltzmann"
    temperature: Positive = 0.07
    learnable: bool = False
    symmetric: bool = False
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    candidates: Literal["global", "local"] = "global"


class Target(Node):
    """One target group of the objective: what is predicted, from whose tokens, under which law.

    The columns are those of the method's Table 1: target data (`image`, `view`), target
    representation, regularisation (`guard`) and form of the distribution (`likelihood`).
    """

    name: str
    image: Literal["i", "j"] = "i"
    view: Literal["same", "other"] = "same"
    representation: Literal["pixels", "features", "global", "text", "category"]
    guard: Literal["none", "stop_gradient", "negatives", "decorrelation"] = "none"
    encoder: Literal["momentum", "online"] = "momentum"
    likelihood: Annotated[Gaussian | Boltzmann, Field(discriminator="form")]
    positions: Literal["masked", "all"] = "all"
    normalise: Literal["none", "layer_norm", "l2", "norm_pix"] = "none"
    weight: Positive = 1.0
    decorrelation_weight: Positive = 0.005

    @property
    def dense(self) -> bool:
        """Whether there is one target per patch."""
        return self.representation in ("pixels", "features")

    @property
    def supervised(self) -> bool:
        """Whether the group belongs to L_SP (text, category) rather than to L_SSP."""
        return self.representation in ("text", "category")

    @model_validator(mode="after")
    def _possible(self) -> Target:
        problem = next((why for bad, why in self._impossible() if bad), None)
        if problem:
            raise ValueError(f"target {self.name!r}: {problem}")
        return self

    def _impossible(self) -> Iterable[tuple[bool, str]]:
        gaussian = self.likelihood.form == "gaussian"
        guard, what = self.guard, self.representation
        yield (
            guard == "negatives" and gaussian,
            "negatives enter through a softmax; set likelihood.form: boltzmann",
        )
        yield (
            self.supervised and (gaussian or guard != "negatives"),
            f"a {what} target is told from the other {what} targets; set guard: negatives and "
            "likelihood.form: boltzmann",
        )
        yield (
            what == "pixels" and (guard != "none" or not gaussian),
            "pixels cannot collapse; set guard: none and likelihood.form: gaussian",
        )
        yield (
            what in ("features", "global") and guard == "none",
            "a learned target without a guard collapses; set guard: stop_gradient, negatives or "
            "decorrelation",
        )
        yield (
            guard == "decorrelation"
            and (what != "global" or not gaussian or self.normalise != "none"),
            "decorrelation standardises global features itself and is a Gaussian form; set "
            "representation: global, likelihood.form: gaussian, normalise: none",
        )
        yield (
            self.encoder == "online" and what == "features",
            "dense features are a target of the momentum encoder only; set encoder: momentum",
        )
        yield (
            self.positions == "masked" and (not self.dense or self.view != "same"),
            "only dense targets in the input view (view: same) have masked positions; set "
            "positions: all",
        )


class Input(Node):
    """What the online encoder sees: the clean input view, a masked one, or a mix of two images."""

    corruption: Literal["none", "mask", "mix"] = "mix"
    mask: Literal["block", "random"] = "block"
    patch: Count = 16
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5


class Balance(Node):
    """`lambda = gamma g_ssp / g_sp`, `g` moving averages of gradient norms at the features."""

    gamma: Positive = 1.0
    decay: Fraction = 0.99


class Objective(Node):
    """Input and list of target groups; `L = sum_k -log P_k(z_k | z_hat_k)`."""

    input: Input = Input()
    targets: list[Target] = Field(min_length=1)
    balance: Balance | None = Balance()

    @model_validator(mode="after")
    def _possible(self) -> Objective:
        names = [target.name for target in self.targets]
        if len(set(names)) < len(names):
            raise ValueError(f"target names must differ, got {names}")
        for target in self.targets:
            if target.image == "j" and self.input.corruption != "mix":
                raise ValueError(
                    f"target {target.name!r} is of image j, which only a mix contains; "
                    "set input.corruption: mix or image: i"
                )
            if target.positions == "masked" and self.input.corruption == "none":
                raise ValueError(
                    f"target {target.name!r} asks for masked positions of an unmasked input; "
                    "set input.corruption: mask or mix, or positions: all"
                )
        for what in {target.representation for target in self.targets}:
            laws = [t.likelihood for t in self.targets if t.representation == what]
            if any(law != laws[0] for law in laws):
                raise ValueError(f"all {what} targets share one likelihood, got {laws}")
        sides = {target.supervised for target in self.targets}
        if self.balance is not None and len(sides) < 2:
            raise ValueError(
                "balance weighs self-supervised against supervised targets and only one kind is "
                "present; set balance: null"
            )
        return self


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

    tokenizer: str
    vocab_size: Count = 30522
    depth: Count = 12
    width: Count = 768
    heads: Count = 12
    ffn: Count = 3072
    max_length: Count = 64
    embed_dim: Count = 768
    checkpoint_blocks: bool = False


class GlobalHead(Node):
    """Projector and predictor (MLPs) of `global` targets; built only when one is present."""

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
    index: str
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
    view_a: Photometric = Photometric(blur_probability=1.0)
    view_b: Photometric = Photometric(blur_probability=0.1, solarize_probability=0.2)


class Storage(Node):
    """How shards are read, as `m3i_scale.data.Storage`."""

    retries: Annotated[int, Field(ge=0)] = 4
    cache: str | None = None
    cache_gigabytes: Positive = 100.0
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
    max_bad_rate: Fraction = 0.01
    lanes: Count | None = None  # of the order; part of its identity. None: optimizer.batch
    chunk_megabytes: Positive = 4.0  # read in one piece; part of the order's identity too
    storage: Storage = Storage()


# ----------------------------------------------------------------------------------------- training


class Optimizer(Node):
    """AdamW, its schedule, and the momentum encoder's."""

    batch: Count
    max_micro_batch: Annotated[int, Field(gt=0, multiple_of=2)]
    length: Span
    warmup: Span
    learning_rate: Positive = 1e-3
    final_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    epsilon: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip_norm: Positive | None = 1.0
    ema: Fraction = 0.995
    ema_final: Fraction = 1.0


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
    """How it is run."""

    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
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

    run: str
    folder: str = "runs"
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

    @model_validator(mode="after")
    def _possible(self) -> Config:
        wanted = {target.representation for target in self.objective.targets}
        kinds = {source.kind for source in self.data.sources}
        if "text" in wanted and self.model.text is None:
            raise ValueError("a text target needs a text tower; set model.text.tokenizer")
        if "category" in wanted and not self.model.categories:
            raise ValueError("a category target needs model.categories; set their number")
        for kind in ("text", "category"):
            if kind in wanted and not kinds & {kind, "both"}:
                raise ValueError(
                    f"the objective has a {kind} target but no data source of kind {kind}; "
                    "add one to data.sources or drop the target"
                )
        if self.data.image_size % self.objective.input.patch:
            raise ValueError(
                f"data.image_size {self.data.image_size} is not a multiple of "
                f"objective.input.patch {self.objective.input.patch}"
            )
        return self
