"""What the tasks have in common that start from a backbone and learn from labels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn

from m3i_scale.config.evaluation import Evaluation
from m3i_scale.config.transfer import TransferRun
from m3i_scale.data.map_stream import MapDataset, MapStream, Placed
from m3i_scale.engine.schedules import BatchSplit, Schedule
from m3i_scale.integrations.initial import Initial, open_initial
from m3i_scale.models.layers import residual_blocks
from m3i_scale.models.precision import DTYPES
from m3i_scale.models.stochastic_depth import hash_keys
from m3i_scale.profiling.record import ROWS, Sketch, Trace, trace_sketch
from m3i_scale.tasks.task import SampledTask

PREFIX = "backbone."

# The part of a step that a module belongs to, by the beginning of its name; all others are heads.
_PARTS = {
    "backbone.clip_projector": "heads",
    "backbone.attention_pool": "heads",
    "backbone": "backbone",
    "neck": "neck",
    "tokens": "neck",
    "rpn": "proposals",
    "encoder": "encoder",
    "pixel_decoder": "encoder",
    "decoder": "decoder",
    "transformer": "decoder",
}


class TransferTask(SampledTask):
    """A task whose networks have the backbone under `backbone.`."""

    config: TransferRun

    def __init__(self, config: TransferRun) -> None:
        super().__init__(config)
        self.averages = config.optimizer.average is not None

    def title(self, networks: Any) -> str:
        """The backbone."""
        return self.config.model.backbone.name

    def leaves(self, networks: Any) -> Iterable[nn.Module]:
        """The backbone's residual blocks, which run once."""
        return [block for _, block in residual_blocks(networks.backbone)]

    @property
    def tested(self) -> Sized | None:
        """The images that are tested on, if any."""
        return None

    def notes(self, networks: Any, split: BatchSplit, ranks: int, total: int) -> Iterator[str]:
        """How many images are tested on."""
        if self.tested is not None:
            yield f"tested on {len(self.tested):,} images"

    @abstractmethod
    def sketch(self) -> Sketch:
        """Networks and one pass of them, for `m3i plan`.

        Raises:
            ConfigError: they cannot be built.
        """

    def trace(self, *, kernels: bool) -> Trace:
        """What a pass shows; arguments as of `trace_sketch`.

        Raises:
            ValueError: the networks cannot be built, or there is no Triton for `kernels`.
        """
        precision = self.config.engine.precision
        return trace_sketch(self.sketch(), precision=precision, kernels=kernels)

    def sketched(
        self,
        title: str,
        build: Callable[[], nn.Module],
        run: Callable[[Any], object],
        notes: Sequence[str] = (),
    ) -> Sketch:
        """A sketch in which the backbone's blocks may be checkpointed; arguments as of `Sketch`."""
        checkpointed = self.config.model.backbone.options.get("checkpoint_blocks")
        return Sketch(
            title=title,
            build=build,
            run=run,
            part=_part_of,
            blocks=lambda networks: [
                (name, block)
                for name, block in residual_blocks(networks)
                if name.startswith(PREFIX)
            ],
            recomputed=(PREFIX,) if checkpointed else (),
            leaves=self.leaves,
            checkpointing="model.backbone.options.checkpoint_blocks=true",
            notes=tuple(notes),
        )

    def stream_of(self, dataset: MapDataset) -> MapStream:
        """The stream over a training set, with the limits of the configuration."""
        data = self.config.data
        return MapStream(
            dataset, name="train", seed=self.config.seed,
            max_bad_rate=data.max_bad_rate, bad_window=data.bad_window,
        )  # fmt: skip

    def seed_of(self, batch: Placed) -> int:
        """What is drawn for a micro-batch as a whole is a function of its first position."""
        return int(hash_keys(batch.position[:1], self.config.seed)[0])

    @property
    def workers(self) -> int:
        """`data.workers`."""
        return self.config.data.workers

    @property
    def init(self) -> str | None:
        """`model.init`."""
        return self.config.model.init

    def open_initial(self) -> Initial:
        """Weights of the backbone."""
        return open_initial(self.config.model)

    def common_statement(self) -> dict[str, Any]:
        """What order and loss of every such task depend on."""
        config = self.config
        stated = {
            "seed": config.seed,
            "optimizer.global_batch_size": config.optimizer.global_batch_size,
        }
        return stated | ({} if self.init is None else {"model.init": self.init})

    def momentum(self, step: int, schedule: Schedule) -> float:
        """`optimizer.average`, less in the first steps, so that the start is forgotten soon."""
        average = self.config.optimizer.average
        assert average is not None
        return min(average, (1 + step) / (10 + step))

    @property
    def evaluation(self) -> Evaluation | None:
        """At the end, and at intervals."""
        return self.config.evaluation


def _part_of(name: str) -> str:
    return next((part for start, part in _PARTS.items() if name.startswith(start)), "heads")


def empty_images(config: TransferRun, height: int, width: int) -> Tensor:
    """`ROWS` images (B, 3, H, W) of a trace, in compute precision."""
    return torch.empty(ROWS, 3, height, width, dtype=DTYPES[config.engine.precision])
