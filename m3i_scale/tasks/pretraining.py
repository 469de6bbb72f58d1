"""Pre-training with an objective of `m3i_scale.objective`: M3I, or a row of its Table 1."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from m3i_scale.cluster.launch import World
from m3i_scale.config import Config, ConfigError, Objective, PretrainingOptimizer
from m3i_scale.config.evaluation import FeatureEvaluation
from m3i_scale.data import Stream
from m3i_scale.data.bad_sample import OfOneRank
from m3i_scale.engine.agreement import flat
from m3i_scale.engine.checkpoint import CheckpointReader
from m3i_scale.engine.schedules import BatchSplit, Schedule
from m3i_scale.engine.task import Pairs, Values
from m3i_scale.integrations.frozen import Loaded, load, make_skeletons, open_all
from m3i_scale.integrations.initial import Initial, open_initial
from m3i_scale.models.precision import DTYPES
from m3i_scale.objective.balance import LossBalance
from m3i_scale.objective.figures import figure
from m3i_scale.objective.inputs import MixedBatch, build_input
from m3i_scale.objective.m3i import M3I
from m3i_scale.objective.momentum import ema_coefficient, momentum_by_length, turnovers
from m3i_scale.objective.step_loss import StepLoss
from m3i_scale.profiling.flops import Flops, mean_flops, run_flops
from m3i_scale.tasks.health import Health
from m3i_scale.tasks.learned import Learned
from m3i_scale.tasks.mixes import save_mixes
from m3i_scale.tasks.samples import build_stream
from m3i_scale.tasks.second_stage import BACKBONE, FirstStage, open_first_stage
from m3i_scale.tasks.task import SampledTask


class CategoryError(OfOneRank, ValueError):
    """A sample's category is beyond the classifier."""


class Pretraining(SampledTask):
    """M3I: mixes of two images, targets of a teacher, texts and categories.

    The balance of self-supervised and supervised losses, lambda, is of a step as a whole: figures
    of all micro-steps and ranks renew it after the update.
    """

    even = True  # neighbours are mixed
    picture: str = "mixes.png"
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.balance = LossBalance(config.objective.balance)
        self.health = Health()
        self._teachers: dict[str, Loaded] = {}
        self._step: StepLoss | None = None  # of the whole batch, where samples compare across it

    # ---------------------------------------------------------------------- before the first step

    def networks(self) -> M3I:
        """Student, teacher, decoder, text tower, heads."""
        config = self.config
        encoders = {name: one.encoder for name, one in self._frozen().items()}
        made = M3I(config.model, config.objective, config.data.image_size, encoders)
        backbone = made.student.backbone
        for size in config.data.sizes:
            backbone.grid_size(size, size)
        if config.data.mixed_sizes and getattr(backbone, "position_grid", 1) is None:
            raise ValueError(
                "a ViT that sees several sizes (data.mixed_sizes) has one grid of positions; set "
                f"model.backbone.options.position_grid={made.grid[0]}, of {config.data.image_size} "
                "pixels, or the rows of patches that it starts from"
            )
        return made

    def load_frozen(self, device: torch.device) -> dict[str, str]:
        """`model.frozen_teachers`, in the precision of the run."""
        config, dtype = self.config, DTYPES[self.config.engine.precision]
        for source in open_all(config):
            self._teachers[source.name] = load(source, config.data, device, dtype)
        return {
            f"model.frozen_teachers.{name}": one.identity["sha256"]
            for name, one in self._teachers.items()
        }

    def _frozen(self) -> dict[str, Loaded]:
        """The frozen teachers that targets name."""
        if self._teachers.keys() != set(self.config.objective.frozen_teachers):
            raise RuntimeError("frozen teachers have not been loaded; call load_frozen first")
        return self._teachers

    def title(self, networks: M3I) -> str:
        """The backbone, and its tokens."""
        rows, columns = networks.grid
        return f"{self.config.model.backbone.name}, tokens {rows} x {columns}"

    def leaves(self, networks: M3I) -> Iterable[nn.Module]:
        """Residual blocks: their gradients are reduced when their backward pass has ended."""
        return networks.blocks_run_once()

    def statement(self, sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Seed, batch, augmentation, sources and objective."""
        config, tree = self.config, self.config.model_dump(mode="json")
        data = tree["data"]
        stated: dict[str, Any] = {
            "seed": config.seed,
            "optimizer.global_batch_size": config.optimizer.global_batch_size,
            "data.lanes": config.lanes,
            "data.chunk_mebibytes": data["chunk_mebibytes"],
            "data.image_size": data["image_size"],
            "data.mean": data["mean"],
            "data.std": data["std"],
        }
        if data["mixed_sizes"] is not None:
            stated["data.mixed_sizes"] = data["mixed_sizes"]
        if config.model.init is not None:
            stated["model.init"] = tree["model"]["init"]
        for name, teacher in self._frozen().items():
            stated |= flat(f"model.frozen_teachers.{name}", teacher.identity)
        if config.model.decoder.position_grid is not None:
            stated["model.decoder.position_grid"] = config.model.decoder.position_grid
        stated |= flat("data.augmentation", data["augmentation"])
        for number, source in enumerate(data["sources"]):
            own = {key: value for key, value in source.items() if key not in ("name", "index")}
            if source["captions"] is None:  # as in checkpoints of runs before there were several
                del own["captions"]
            identity = sources[number] if number < len(sources) else {}
            stated |= flat(f"data.sources.{number}", own | {"index": dict(identity)})
        objective = dict(tree["objective"])
        targets = {target["name"]: target for target in objective.pop("targets")}
        return stated | flat("objective", objective | {"targets": targets})

    def require(self, ranks: int) -> None:
        """Evaluation sets are shared by the ranks."""
        if self.learned is not None:
            self.learned.require(ranks)

    @property
    def workers(self) -> int:
        """`data.workers`."""
        return self.config.data.workers

    def flops(self) -> float:
        """Of all networks of the objective."""
        return mean_flops(self.config.data.sizes.values(), self._flops.values()).model

    def flops_by_kind(self) -> dict[str, float]:
        """By the side of the views, where there are several."""
        if self.config.data.mixed_sizes is None:
            return {self.kind: self.flops()}
        return {str(size): flops.model for size, flops in self._flops.items()}

    @functools.cached_property
    def _flops(self) -> dict[int, Flops]:
        return run_flops(self.config, make_skeletons(self.config))

    def facts(self, split: BatchSplit, ranks: int) -> dict[str, Any]:
        """Samples that one softmax compares."""
        whole = self.config.objective.negatives == "batch"
        return {"candidates": split.batch if whole else split.micro * ranks}

    def moved(self, stored: Mapping[str, Any], split: BatchSplit, ranks: int) -> str | None:
        """Another number of candidates changes the loss of a softmax over samples."""
        before, now = stored.get("candidates"), self.facts(split, ranks)["candidates"]
        if self.config.objective.contrastive and before is not None and before != now:
            return (
                f"the checkpoint is of {stored['ranks']} ranks and this run has {ranks}; the "
                f"softmax over samples has {now} candidates instead of {before}, so that its "
                "losses are not comparable with those before"
            )
        return super().moved(stored, split, ranks)

    @property
    def init(self) -> str | None:
        """`model.init`."""
        return self.config.model.init

    def open_initial(self) -> Initial:
        """Weights of the backbone."""
        return open_initial(self.config.model)

    def open_stage(self, reader: CheckpointReader) -> FirstStage:
        """All networks of another run of pre-training."""
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            try:
                networks = self.networks()
            except ValueError as error:
                raise ConfigError(f"the networks cannot be built: {error}") from error
        return open_first_stage(self.config, networks, reader)

    def initial_names(self, names: Iterable[str]) -> dict[str, str]:
        """The student's backbone; the teacher's averages follow."""
        return {f"{BACKBONE}{name}": name for name in names}

    def open_stream(self) -> Stream:
        """Image-text pairs and categorised images from WebDataset shards.

        The indexes of the evaluation are opened, too, so that a fault is found now.
        """
        stream = build_stream(self.config)
        self.learned  # noqa: B018
        return stream

    def notes(self, networks: M3I, split: BatchSplit, ranks: int, total: int) -> Iterator[str]:
        """Sizes, where negatives come from, and how far the teacher moves."""
        if self.config.data.mixed_sizes is not None:
            shares = (f"{100 * s:.3g} % at {n}" for n, s in self.config.data.sizes.items())
            yield f"images of {', '.join(shares)} pixels, drawn for each step"
        if split.accumulation > 1 and self.config.objective.contrastive:
            if self.config.objective.negatives == "batch":
                yield "negatives come from the whole batch: every micro-batch runs forward twice"
            else:  # every micro-step has a softmax of its own
                yield (
                    f"negatives come from the {split.micro * ranks} samples of a micro-step "
                    "(objective.negatives=batch: from all, for a second forward pass)"
                )
        yield from (teacher.line for teacher in self._frozen().values())
        if hasattr(networks, "teacher"):
            start, final = momentum_ends(self.config.optimizer, total)
            times, remaining = turnovers(total, start, final)
            yield (
                f"the teacher forgets its start {times:.3g} times (momentum {start:.6g} to "
                f"{final:.6g}); {100 * remaining:.3g} % of the initial weights remain in it"
            )
        if self.learned is not None:
            yield self.learned.describe()

    # ------------------------------------------------------------------------------ around a step

    def prepare(self, batch: Any, world: World) -> MixedBatch:
        """Move a batch to the device, distort and mix it there."""
        config = self.config
        _require_categories(batch, config.objective, config.model.categories)
        if config.data.mixed_sizes is not None:
            self.kind = str(batch.view_a.shape[1])
        mean, std = config.data.mean, config.data.std
        prepared = build_input(
            batch.to(world.device),
            config.objective.input,
            mean=mean,
            std=std,
            dtype=DTYPES[config.engine.precision],
            seed=config.seed,
        )
        path = config.run_folder / self.picture
        if config.logging.pictures and world.is_main and not path.exists():
            save_mixes(path, prepared, mean, std, config.objective.input.patch)
        return prepared

    def forward(self, engine: nn.Module, inputs: MixedBatch) -> dict[str, Tensor]:
        """The loss under today's lambda."""
        outputs: dict[str, Tensor] = engine(inputs, self.balance.supervised_weight, step=self._step)
        return outputs

    def figures(self, networks: M3I, outputs: dict[str, Tensor]) -> Pairs:
        """And the squares of the gradients at the features, which the balance reads."""
        squares = networks.probe.squares(self.balance.supervised_weight)
        return super().figures(networks, outputs) | {
            "gradient_square/ssp": figure(squares[0]),
            "gradient_square/sp": figure(squares[1]),
        }

    def step_values(self, means: Values, parts: int) -> Values:
        """Norms of the gradient of the whole batch at the features, and lambda.

        Each micro-batch's loss is divided by their number, and so is its gradient.
        """
        self._step = None
        size = {"image_size": float(self.kind)} if self.kind else {}
        return size | {
            "gradient/ssp": math.sqrt(means.pop("gradient_square/ssp") / parts),
            "gradient/sp": math.sqrt(means.pop("gradient_square/sp") / parts),
            "balance/lambda": self.balance.supervised_weight,
        }

    def upper_bounds(self, networks: M3I) -> Iterable[tuple[nn.Parameter, float]]:
        """Temperatures."""
        return networks.upper_bounds()

    def momentum(self, step: int, schedule: Schedule) -> float:
        """A cosine between `optimizer.teacher_momentum` and `teacher_momentum_final`."""
        return ema_coefficient(
            step, schedule.total, *momentum_ends(self.config.optimizer, schedule.total)
        )

    def after_update(self, values: Values) -> None:
        """Renew lambda."""
        self.balance.update(values["gradient/ssp"], values["gradient/sp"])

    def warnings(self, values: Values, step: int) -> Iterable[str]:
        """Features that collapse, a lambda out of all proportion."""
        return self.health.warnings(values, step)

    def looks_first(self, accumulation: int) -> bool:
        """With `objective.negatives: batch`, where the batch is more than one micro-batch."""
        return self.config.objective.runs_twice(accumulation)

    def look(self, engine: nn.Module, inputs: MixedBatch) -> None:
        """Collect embeddings."""
        if self._step is None:
            self._step = StepLoss(self.config.objective)
        engine(inputs, step=self._step)

    def looked(self, networks: M3I) -> None:
        """Compute the losses between them."""
        assert self._step is not None
        self._step.close(networks.queues, networks.running_centres)

    # ---------------------------------------------------------------------------------- evaluation

    @functools.cached_property
    def learned(self) -> Learned | None:
        """The evaluation, with its indexes open; None: there is none.

        Raises:
            ConfigError: an index cannot be used.
        """
        return None if self.config.evaluation is None else Learned(self.config)

    @property
    def evaluation(self) -> FeatureEvaluation | None:
        """`evaluation`."""
        return self.config.evaluation

    def evaluate(self, networks: nn.Module, world: World) -> Values:
        """What the encoder has learned."""
        assert self.learned is not None
        return self.learned.figures(networks, world)

    def state_dict(self) -> dict[str, Any]:
        """The averages of the balance, and the rank that features started with."""
        return {"balance": self.balance.state_dict(), "start_rank": self.health.start_rank}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them; older checkpoints have no rank."""
        self.balance.load_state_dict(state["balance"])
        self.health.start_rank = state.get("start_rank")


def momentum_ends(spec: PretrainingOptimizer, total_steps: int) -> tuple[float, float]:
    """The teacher's momentum at the first step and at the last."""
    start, final = spec.teacher_momentum, spec.teacher_momentum_final
    if start == "by_length":
        return momentum_by_length(total_steps, final), final
    assert not isinstance(start, str)
    return start, final


def _require_categories(batch: Any, objective: Objective, categories: int) -> None:
    """Refuse a label that the classifier has no row for, while the batch is on the CPU.

    On a GPU it would end in an assertion of the device, without a name.
    """
    if "category" not in objective.representations or not len(batch):
        return
    labels = batch.category.numpy()
    largest = int(labels.max())
    if largest >= categories:
        key = batch.key[int(labels.argmax())]
        raise CategoryError(
            f"sample {key} has category {largest}, but model.categories is {categories}, for "
            f"categories 0 to {categories - 1}; set model.categories={largest + 1} or more before "
            "the first start of the run, or mend the labels"
        )
