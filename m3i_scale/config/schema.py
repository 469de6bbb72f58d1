"""The configuration tree, and its sections about training: optimiser, engine, checkpoints, logs.

`model.py`, `data.py` and `objective.py` have the sections of these names. The package imports
nothing else of the project and touches no data, GPU or process group. The tree refuses an
impossible combination with a sentence that says what is wrong and how to mend it; `load.py` reads
it from YAML and from the command line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from m3i_scale.config.data import Data
from m3i_scale.config.evaluation import FeatureEvaluation
from m3i_scale.config.model import Model
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


class Optimizer(Node):
    """AdamW and its schedule.

    `global_batch_size` stays what it is on any number of ranks: what `max_micro_batch` does not
    take at once is accumulated.
    """

    global_batch_size: Count
    """Samples of an optimiser step on all ranks together."""
    max_micro_batch: Count
    """Most samples that a rank computes at once."""
    duration: Span
    """Length of training: `100 steps`, `1e6 samples`, `30 epochs`."""
    warmup: SpanOrZero
    """Length of the linear rise of the learning rate from 0."""
    learning_rate: Positive = 1e-3
    """Peak, which the warm-up ends at."""
    final_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    """End of every schedule but `step`."""
    schedule: Literal["cosine", "linear", "poly", "step"] = "cosine"
    """How the rate falls after the warm-up; `poly` is (1 - progress) ** `power`, `step` multiplies
    by `step_factor` at each of `step_at`.
    """
    power: Positive = 0.9
    """Exponent of `poly`."""
    step_at: list[Span] = []
    """When `step` lowers the rate, from the start of the run."""
    step_factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """What `step` multiplies by."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """Adam's averaging factors."""
    epsilon: Positive = 1e-8
    """Adam's epsilon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Of weight matrices; biases, norms and temperatures have none."""
    clip_norm: Positive | None = 1.0
    """Largest global norm of the gradient; null: no clipping."""

    @property
    def lars(self) -> bool:
        """Whether LARS takes the place of AdamW."""
        return False

    @property
    def moments(self) -> int:
        """Averages that the optimiser keeps of each weight."""
        return 1 if self.lars else 2

    @model_validator(mode="after")
    def _schedule_is_whole(self) -> Optimizer:
        if self.schedule == "step" and not self.step_at:
            raise ValueError("schedule: step needs step_at; say when the rate falls")
        if self.schedule != "step" and self.step_at:
            raise ValueError(
                f"step_at belongs to schedule: step (it is {self.schedule}); remove one of them"
            )
        return self


class PretrainingOptimizer(Optimizer):
    """AdamW, its schedule, and the teacher's.

    `global_batch_size` stays what it is on any number of ranks: what `max_micro_batch` does not
    take at once is accumulated. A softmax over other samples (`regularisation: negatives`) sees
    those of one micro-step on all ranks, so its negatives become fewer with accumulation, unless
    `objective.negatives` is `batch`.
    `teacher_momentum` is a number or `by_length`: so that the teacher forgets its start seven times
    in the run, however short it is (docs/paper.md).
    """

    max_micro_batch: Annotated[int, Field(gt=0, multiple_of=2)]
    """Most samples that a rank computes at once."""
    teacher_momentum: Momentum = 0.995
    """Share of the old average in the teacher's update, at the beginning; or `by_length`."""
    teacher_momentum_final: Fraction = 1.0
    """The same at the end; a cosine in between."""


class Zero(Node):
    """What ZeRO splits over the ranks, and settings of DeepSpeed with a meaning here.

    Stage 1 splits Adam's moments and the master weights, stage 2 gradients too, stage 3 the weights
    that networks compute with as well: less memory, more collectives and more work for Python.
    `m3i plan` compares the three. Weights, averages and checkpoints are the same, and a run may go
    on at another stage.
    """

    stage: Literal[1, 2, 3] = 3
    """What is split: 1, 2 or 3."""
    persistence_threshold: Annotated[int, Field(ge=0)] = 100_000
    """Stage 3: parameters up to this number of elements stay whole on every rank."""
    prefetch_bucket: Count = 50_000_000
    """Stage 3: elements gathered ahead."""
    reduce_bucket: Count = 200_000_000
    """Elements of gradients reduced at once."""
    max_live_parameters: Count = 1_000_000_000
    """Stage 3: most gathered elements at a time."""
    hpz_partition: Count = 1
    """Stage 3: ranks of a second partition inside a node (ZeRO++ hpZ); 1: none."""
    offload_optimizer: bool = False
    """Stage 3: keep optimiser states in host memory."""
    extra: dict[str, Any] = {}
    """Anything else of DeepSpeed's configuration, merged over what this program writes."""

    @model_validator(mode="after")
    def _of_the_stage(self) -> Zero:
        if self.stage < 3 and self.hpz_partition > 1:
            raise ValueError(
                f"hpz_partition {self.hpz_partition} needs stage 3: at stage {self.stage} every "
                "rank has all weights; remove it, or set stage: 3"
            )
        if self.stage < 3 and self.offload_optimizer:
            # DeepSpeed would keep the gradients of a skipped step there for all that follow.
            raise ValueError(
                f"offload_optimizer needs stage 3, which splits the states over as many ranks as "
                f"stage {self.stage}; set stage: 3"
            )
        return self


class Verify(Node):
    """Errors that the hardware makes without a word, and how they are looked for.

    A step that is computed twice is deterministic. It took ten times as long as another on one H100
    (InternImage-H): at the default interval 1 % of the time. The state's checksums read it twice a
    step: 36 bytes for each parameter, divided by the ranks at stage 3, and 4 of a whole teacher. An
    error ends the run with code 89 and the last good checkpoint.
    """

    every: Count | None = 1000
    """Steps between those that are computed twice and compared bit for bit; null: never."""
    state: bool = True
    """In every step, check that weights, moments and averages have not changed since the update
    before, and are alike where all ranks have them.
    """


class Engine(Node):
    """Precision and devices, ZeRO, and what happens to unstable and stalled runs."""

    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of computation; master weights stay float32."""
    teacher: Literal["whole", "sharded"] = "whole"
    """Where the teacher's weights are: `whole` on every GPU (2 bytes a parameter in bf16, one all-
    gather a step), or `sharded` like the student's at ZeRO stage 3 (least memory). Values and
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
    """ZeRO: its stage and its buffers."""
    max_nonfinite_steps: Count = 10
    """Skipped steps in a row, because a gradient is not finite, that make a run unstable."""
    rollbacks: Annotated[int, Field(ge=0)] = 0
    """How often an unstable run may go back to its last good checkpoint by itself."""
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """A loss above this multiple of its average makes a run unstable; null: never."""
    stall_minutes: Positive = 30.0
    """Minutes without a step, or a forward pass of an evaluation, after which each rank writes its
    stacks and exits with 87.
    """
    timeout_minutes: Positive = 60.0
    """Of collectives."""
    verify: Verify = Verify()
    """Errors that nobody sees: what is computed twice, and which checksums are compared."""

    @model_validator(mode="after")
    def _teacher_of_the_stage(self) -> Engine:
        if self.zero.stage < 3 and self.teacher == "sharded":
            raise ValueError(
                f"teacher: sharded needs zero.stage 3: at stage {self.zero.stage} every rank has "
                "all weights of the student, too; set teacher: whole, or zero.stage: 3"
            )
        return self


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
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow", "csv"]] = ["tensorboard"]
    """Where figures, pictures and the table of `m3i eval` go besides metrics.jsonl; [] is nowhere.
    """
    project: Annotated[str, Field(min_length=1)] = "m3i_scale"
    """Project of wandb and trackio, experiment of mlflow."""
    pictures: bool = True
    """Draw mixes.png at the start."""

    @model_validator(mode="after")
    def _once(self) -> Logging:
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError("trackers has a tracker twice; name each once")
        return self


class RunConfig(Node):
    """What every task has: a name, an optimiser, an engine, checkpoints and logs."""

    run: RunName
    """Name of the run: its folder below `folder`."""
    folder: PathText = "runs"
    """Folder of all runs."""
    seed: int = 0
    """Of the weights, the order of the data, and augmentation."""
    optimizer: Optimizer
    """Batch, duration, AdamW, schedule."""
    engine: Engine = Engine()
    """Precision, devices, ZeRO, stability."""
    checkpoint: Checkpoint = Checkpoint()
    """When to save, what to keep."""
    logging: Logging = Logging()
    """What is written beside checkpoints."""

    @property
    def run_folder(self) -> Path:
        """Where everything about this run is written."""
        return Path(self.folder) / self.run


class Config(RunConfig):
    """The whole tree of pre-training."""

    task: Literal["pretraining"] = "pretraining"
    """What is trained."""
    model: Model
    """The networks."""
    objective: Objective
    """The input and the target groups."""
    data: Data
    """The stream of samples."""
    optimizer: PretrainingOptimizer
    """Batch, duration, AdamW, teacher momentum."""
    evaluation: FeatureEvaluation | None = None
    """Evaluation while training; null: none, and `m3i eval` evaluates checkpoints."""

    @property
    def evaluated_encoder(self) -> Literal["student", "teacher"]:
        """What `evaluation.weights` means here."""
        asked = self.evaluation.weights if self.evaluation else "auto"
        if asked == "auto":
            return "teacher" if self.objective.has_teacher else "student"
        return asked

    @property
    def lanes(self) -> int:
        """Reading positions of each source: `data.lanes`, or else a global batch's samples."""
        return self.data.lanes or self.optimizer.global_batch_size

    @property
    def unsupplied(self) -> set[str]:
        """Those of "text" and "category" that targets ask for and no data source has."""
        sources = self.data.sources
        supplied = {
            "text": any(source.has_text for source in sources),
            "category": any(source.has_category for source in sources),
        }
        return {kind for kind in self.objective.representations if not supplied.get(kind, True)}

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
        for target in self.objective.targets:
            if target.frozen and target.encoder not in self.model.frozen_teachers:
                known = ", ".join(["teacher", "student", *self.model.frozen_teachers])
                raise ValueError(
                    f"target {target.name!r} has encoder {target.encoder!r}, and there is none; "
                    f"take one of {known}, or describe it in model.frozen_teachers"
                )
        for size in self.data.sizes:
            if size % self.objective.input.patch:
                key = "data.mixed_sizes" if self.data.mixed_sizes else "data.image_size"
                raise ValueError(
                    f"{key} {size} is not a multiple of objective.input.patch "
                    f"{self.objective.input.patch}"
                )
        if self.evaluation is not None:
            self._require_networks_of(self.evaluation)
        return self

    def _require_networks_of(self, evaluation: FeatureEvaluation) -> None:
        """Raise ValueError where a task asks for what the objective does not train."""
        for task, kind, part in (
            ("zero_shot", "text", "a text tower"),
            ("retrieval", "text", "a text tower"),
            ("classifier", "category", "a classifier of categories"),
        ):
            if task in evaluation.tasks and kind not in self.objective.representations:
                raise ValueError(
                    f"evaluation.tasks has {task}, which needs {part}, and the objective has no "
                    f"{kind} target to train it; take {task} out, or add such a target"
                )
        if self.evaluated_encoder == "teacher" and not self.objective.has_teacher:
            raise ValueError(
                "evaluation.weights is teacher and no target of the objective uses one; set it to "
                "student, or to auto"
            )
