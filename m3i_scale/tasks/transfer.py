"""What the tasks have in common that start from a backbone and learn from labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from m3i_scale.config.evaluation import Evaluation
from m3i_scale.config.transfer import TransferRun
from m3i_scale.data.map_stream import MapDataset, MapStream, Placed
from m3i_scale.engine.schedules import Schedule
from m3i_scale.integrations.initial import Initial, open_initial
from m3i_scale.models.layers import residual_blocks
from m3i_scale.models.stochastic_depth import hash_keys
from m3i_scale.tasks.task import SampledTask


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
