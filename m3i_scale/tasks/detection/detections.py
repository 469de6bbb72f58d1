"""What detectors give: detections of an image, and losses as figures of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from m3i_scale.objective.figures import figure


@dataclass(frozen=True)
class Detections:
    """N detections in an image, in pixels of the stored image, the best score first.

    boxes   float32 (N, 4): left, top, right, bottom
    labels  int64 (N,), categories from 0
    scores  float32 (N,), 0 to 1
    masks   bool (N, H, W), or None
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


def figures(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Losses as "loss/NAME": [sum, count] in float32, without gradient."""
    return {f"loss/{name}": figure(value) for name, value in losses.items()}
