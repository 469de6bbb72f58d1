"""What a run trains, as the engine sees it.

The engine shards, steps, logs, saves and resumes; a task says which networks, what a batch becomes,
what the loss depends on, and what happens around a step. `m3i_scale.tasks` has the tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from m3i_scale.cluster.launch import World
from m3i_scale.config import ConfigError, RunConfig
from m3i_scale.config.evaluation import Evaluation
from m3i_scale.engine.checkpoint import CheckpointReader
from m3i_scale.engine.schedules import BatchSplit, Schedule
from m3i_scale.objective.figures import figure

Values = dict[str, float]
Pairs = dict[str, Tensor]  # (sum, count) of each figure of a micro-step


class Stream(Protocol):
    """What the loop needs of a stream of samples: batches from any global position on."""

    def loader(
        self,
        *,
        start: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        workers: int,
        end: int | None,
        pin_memory: bool,
    ) -> Iterable[Any]:
        """Micro-step t of rank r starts at `start + (t * world_size + r) * micro_batch`."""


class InitialWeights(Protocol):
    """Weights that networks start with: `integrations.initial.Initial`, or a stage before."""

    @property
    def names(self) -> Iterable[str]:
        """Parameters that there are weights for, as the weights call them."""
        ...

    def part(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` of a flattened parameter, float32, on the CPU.

        Of kind "weight", or of kind "teacher" the moving average that it starts with.
        """
        ...

    def lines(self) -> list[str]:
        """What is loaded and what is new."""
        ...

    def record(self) -> dict[str, Any]:
        """The same as JSON."""
        ...


class StudentTeacher(Protocol):
    """Networks with a frozen copy of a part that follows that part's moving average."""

    student: nn.Module
    teacher: nn.Module

    def separate_teacher(self) -> nn.Module:
        """Take the teacher out of the tree of modules; the forward pass still uses it."""
        ...


class UsesFrozen(Protocol):
    """Networks that use modules outside of their tree, which nothing shards, trains or saves."""

    frozen: Mapping[str, nn.Module]  # whole on every rank


# Not `isinstance` with a runtime-checkable protocol: from Python 3.12 on that does not see
# submodules, which `nn.Module.__getattr__` finds.
def has_teacher(model: nn.Module) -> TypeGuard[StudentTeacher]:
    """Whether networks have a student and its teacher."""
    return all(hasattr(model, name) for name in ("student", "teacher", "separate_teacher"))


def uses_frozen(model: nn.Module) -> TypeGuard[UsesFrozen]:
    """Whether networks use modules outside of their tree."""
    return hasattr(model, "frozen")


class Task(ABC):
    """What a run trains.

    Networks are one plain module. Called with what `prepare` returns it gives a dictionary: the
    loss of this rank's micro-batch under "loss", whose mean over ranks and micro-steps is what
    training minimises, and figures as (sum, count), the same names on every rank in every step.
    In evaluation mode they may give anything that `evaluate` understands.

    Attributes:
        config: the whole configuration.
        even: micro-batches have an even number of samples.
        built_whole: networks cannot be built partitioned (those of transformers write to weights
            while they are built); every rank builds them in host memory.
        averages: keep a moving average of all weights, which `evaluate` uses.
        precomputes: `precompute` has something to do.
        kind: of the step under way, where steps differ in what a sample costs.
        picture: name of a picture that `prepare` draws into the run folder in the first step.
    """

    even = False
    built_whole = False
    averages = False
    precomputes = False
    picture: str | None = None
    kind: str = ""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    # ---------------------------------------------------------------------- before the first step

    @abstractmethod
    def networks(self) -> nn.Module:
        """Build them; torch's global generator draws, seeded by the engine.

        Raises:
            ValueError: they cannot be built.
        """

    def title(self, networks: Any) -> str:
        """The networks in a few words."""
        return type(networks).__name__

    @abstractmethod
    def statement(self, sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """All that order, samples and loss depend on: configuration key -> JSON value.

        Args:
            sources: what each source of samples is, whatever its path.
        """

    @property
    @abstractmethod
    def workers(self) -> int:
        """Worker processes of each rank that load samples."""

    @abstractmethod
    def flops(self) -> float:
        """FLOPs of one sample of a step, without recomputation; the mean over kinds of steps."""

    def flops_by_kind(self) -> Mapping[str, float]:
        """The same by kind of step (`kind`), where there are several."""
        return {self.kind: self.flops()}

    def require(self, ranks: int) -> None:  # noqa: B027  (most tasks run on any number)
        """Refuse a number of ranks that the task cannot run on.

        Raises:
            ConfigError: it is such a number.
        """

    def facts(self, split: BatchSplit, ranks: int) -> dict[str, Any]:
        """What a checkpoint says besides, as JSON."""
        return {}

    def moved(self, stored: Mapping[str, Any], split: BatchSplit, ranks: int) -> str | None:
        """What another number of ranks than the checkpoint's does; None if it is the same."""
        if stored["ranks"] == ranks:
            return None
        return f"the checkpoint is of {stored['ranks']} ranks and this run has {ranks}"

    def leaves(self, networks: Any) -> Iterable[nn.Module]:
        """Modules that ZeRO-3 may gather as a whole; each runs at most once with gradient."""
        return ()

    def rate_factors(self, networks: Any) -> Mapping[str, float]:
        """Parameter names whose learning rate is a multiple of the schedule's."""
        return {}

    @property
    def init(self) -> str | None:
        """Weights to start from; None: drawn."""
        return None

    def open_initial(self) -> InitialWeights:
        """Open what `init` names.

        Raises:
            ConfigError: it cannot be read, or does not fit.
        """
        raise NotImplementedError

    def open_stage(self, reader: CheckpointReader) -> InitialWeights:
        """As `open_initial`, where `init` names a run, of which this is a checkpoint."""
        raise ConfigError(
            f"model.init {self.init} is a run, and this task starts from a backbone; export it "
            "(m3i export) and name the file"
        )

    def initial_names(self, names: Iterable[str]) -> dict[str, str]:
        """Parameters of the networks, and of those in the initial weights they start as."""
        return {f"backbone.{name}": name for name in names}

    def load_frozen(self, device: torch.device) -> dict[str, str]:
        """Load networks that others read and nobody changes, before `statement` and `networks`.

        Returns:
            The checksum of each by its key in the configuration, to be the same on all ranks.

        Raises:
            ConfigError: one cannot be read, or does not fit.
        """
        return {}

    def precompute(self, world: World, stopping: Callable[[], bool]) -> None:  # noqa: B027
        """Write what training reads, after `load_frozen` and before `networks` (a collective).

        Args:
            world: this rank.
            stopping: whether the run was asked to stop.

        Raises:
            ConfigError: it cannot be computed or written.
            StoppedEarly: the run was asked to stop.
        """

    def notes(self, networks: Any, split: BatchSplit, ranks: int, total: int) -> Iterator[str]:
        """Further lines of `--dry-run`."""
        yield from ()

    # ------------------------------------------------------------------------------ around a step

    @abstractmethod
    def prepare(self, batch: Any, world: World) -> Any:
        """What the networks take, on the device."""

    def forward(self, engine: nn.Module, inputs: Any) -> dict[str, Tensor]:
        """Run the networks, wrapped by the engine."""
        outputs: dict[str, Tensor] = engine(inputs)
        return outputs

    def figures(self, networks: Any, outputs: dict[str, Tensor]) -> Pairs:
        """This micro-step's figures, after the backward pass."""
        pairs = {name: value for name, value in outputs.items() if name != "loss"}
        return pairs | {"loss/total": figure(outputs["loss"])}

    def step_values(self, means: Values, parts: int) -> Values:
        """Derived figures of a step; may take out of `means` what is of no use by itself.

        Args:
            means: of the figures of all micro-steps and ranks.
            parts: their number, of which each has a part of the batch.
        """
        return {}

    def upper_bounds(self, networks: Any) -> Iterable[tuple[nn.Parameter, float]]:
        """Parameters that must not stay above a bound after a step."""
        return ()

    def momentum(self, step: int, schedule: Schedule) -> float:
        """Share of the old average in that of a step, for teachers and averages."""
        raise NotImplementedError

    def after_update(self, values: Values) -> None:  # noqa: B027  (most tasks do nothing)
        """Take in the figures of a step that has changed the weights."""

    def warnings(self, values: Values, step: int) -> Iterable[str]:
        """What a user should look at, one sentence each."""
        return ()

    # ------------------------------------------- before it, where a step sees its whole batch first

    def looks_first(self, accumulation: int) -> bool:
        """Whether all micro-batches of a step run once without gradient before they train."""
        return False

    def look(self, engine: nn.Module, inputs: Any) -> None:
        """Run a micro-batch without gradient."""
        raise NotImplementedError

    def looked(self, networks: Any) -> None:
        """All micro-batches have run so."""
        raise NotImplementedError

    # -------------------------------------------------------------------------------- besides

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the task, as JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  (as above)
        """Restore `state_dict()` from the whole state of a checkpoint."""

    @property
    def evaluation(self) -> Evaluation | None:
        """When `evaluate` runs; None: never."""
        return None

    def evaluate(self, networks: Any, world: World) -> Values:
        """Figures of the networks in evaluation mode, wrapped by the engine (a collective).

        All ranks call the networks equally often: at ZeRO stage 3 every call is a collective.
        """
        raise NotImplementedError
