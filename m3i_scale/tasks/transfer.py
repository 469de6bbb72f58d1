"""What the tasks have in common that start from a backbone and learn from labels."""

from __future__ import annotations

from typing import Any

from m3i_scale.config.transfer import Evaluation, TransferRun
from m3i_scale.engine.schedules import Schedule
from m3i_scale.integrations.initial import Initial, Starts, open_initial
from m3i_scale.tasks.task import SampledTask


class TransferTask(SampledTask):
    """A task with `model.backbone`, `model.init`, `data.workers`, and an evaluation.

    Its networks have the backbone under `backbone.`.
    """

    config: TransferRun

    def __init__(self, config: TransferRun) -> None:
        super().__init__(config)
        self.averages = config.optimizer.average is not None

    @property
    def _model(self) -> Starts:
        found: Starts = self.config.model  # type: ignore[attr-defined]
        return found

    def title(self, networks: Any) -> str:
        """The backbone."""
        return self._model.backbone.name

    @property
    def workers(self) -> int:
        """`data.workers`."""
        return int(self.config.data.workers)  # type: ignore[attr-defined]

    @property
    def init(self) -> str | None:
        """`model.init`."""
        return self._model.init

    def open_initial(self) -> Initial:
        """Weights of the backbone."""
        return open_initial(self._model)

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
