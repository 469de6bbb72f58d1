"""f_psi: what predicts the targets of each group from z_x, and the state of their likelihoods.

Image decoders of dense targets, linear layers and MLPs of single tokens, predictors of pooled
vectors; temperatures, queues and centres.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from m3i_scale.config import Boltzmann, Gaussian, Model, Objective, Sigmoid, Target
from m3i_scale.models.frozen import FrozenEncoder
from m3i_scale.models.heads import MLP, Temperature
from m3i_scale.models.image_decoder import ImageDecoder
from m3i_scale.models.layers import HEADS, XavierLinear
from m3i_scale.models.positions import Grid, on_trained_grid, relative_positions
from m3i_scale.objective.centre import RunningCentre
from m3i_scale.objective.encoder import Encoder
from m3i_scale.objective.inputs import MixedBatch
from m3i_scale.objective.key_queue import KeyQueue
from m3i_scale.objective.likelihoods import normalise
from m3i_scale.objective.roles import Role, take, target_view


class Predictors(nn.Module):
    """The parts of `M3I` behind the student; it sets what they read and then has them added."""

    objective: Objective
    student: Encoder
    frozen: dict[str, FrozenEncoder]
    grid: Grid
    position_side: int
    stride: int
    text_projection: XavierLinear

    def grid_of(self, mixed: MixedBatch) -> Grid:
        """Rows and columns of the patches of a micro-batch's views."""
        height, width = mixed.clean_a.shape[-2:]
        return height // self.stride, width // self.stride

    def _add_image_heads(self, model: Model) -> None:
        """Decoders of dense targets and predictors: f_psi."""
        backbone, head = self.student.backbone, model.global_head
        targets = [target for target in self.objective.targets if not target.frozen]
        widths = {"features": backbone.width, "pixels": 3 * backbone.stride**2}
        used = {(t.representation, t.decoder) for t in targets}
        self.decoders = nn.ModuleDict(
            {
                what: ImageDecoder(backbone.width, **_sizes(model), out_width=width)
                for what, width in widths.items()
                if (what, "transformer") in used
            }
        )
        self.linear_decoders = nn.ModuleDict(
            {
                what: HEADS[model.decoder.head](backbone.width, width)
                for what, width in widths.items()
                if (what, "linear") in used
            }
        )
        if head.predictor and self.student.projector is not None:
            self.predictor = MLP(head.width, head.hidden, head.width)
        if head.predictor and self.student.dense_projector is not None:
            self.dense_predictor = MLP(head.width, head.hidden, head.width)

    def _add_frozen_heads(self, model: Model) -> None:
        """What predicts the targets of frozen teachers: decoders by their names, MLPs."""
        backbone, hidden = self.student.backbone, model.global_head.hidden
        self.frozen_heads = nn.ModuleDict()
        for target in self._present():
            if not target.frozen or target.representation == "gram":
                continue
            parts, name = self._predictor_of(target)
            width = self._target_width(target, model)
            if name in parts:  # serves an earlier group, too
                continue
            if not target.dense:
                parts[name] = MLP(backbone.embed_dim, hidden, width)
            elif target.decoder == "projector":
                parts[name] = MLP(backbone.width, hidden, width)
            elif target.decoder == "linear":
                parts[name] = HEADS[model.decoder.head](backbone.width, width)
            else:
                parts[name] = ImageDecoder(backbone.width, **_sizes(model), out_width=width)

    def _predictor_of(self, target: Target) -> tuple[nn.ModuleDict, str]:
        """Where a dense group's decoder, or a frozen teacher's group's predictor, is."""
        name = target.encoder if target.frozen else target.representation
        if not target.dense:
            return self.frozen_heads, f"{name}_global"
        if target.decoder == "projector":
            return self.frozen_heads, f"{name}_dense"
        return (self.linear_decoders if target.decoder == "linear" else self.decoders), name

    def _present(self) -> list[Target]:
        """Groups whose target encoders are at hand: all of them in training."""
        targets = self.objective.targets
        return [t for t in targets if not t.frozen or t.encoder in self.frozen]

    def _add_contrastive_state(self, model: Model) -> None:
        """Temperatures, one for each representation; queues and centres, one for each group."""
        self.temperatures, self.queues = nn.ModuleDict(), nn.ModuleDict()
        self.running_centres = nn.ModuleDict()
        for target in self._present():
            width, likelihood = self._target_width(target, model), target.likelihood
            if target.centre == "running":
                self.running_centres[target.name] = RunningCentre(width, target.centre_decay)
            if isinstance(likelihood, Gaussian):
                continue
            if target.representation not in self.temperatures:
                bias = likelihood.bias if isinstance(likelihood, Sigmoid) else None
                self.temperatures[target.representation] = Temperature(
                    likelihood.temperature, likelihood.learnable, bias
                )
            if isinstance(likelihood, Boltzmann) and likelihood.queue:
                self.queues[target.name] = KeyQueue(likelihood.queue, width)

    def _target_width(self, target: Target, model: Model) -> int:
        """D of an image target."""
        if target.representation == "gram":
            return self.grid[0] * self.grid[1]
        if target.frozen:
            encoder = self.frozen[target.encoder]
            wanted = encoder.width if target.dense else encoder.pooled_width
            if wanted is None:
                raise ValueError(
                    f"target {target.name!r} is global, and the frozen teacher {target.encoder} "
                    "has no trained pooling; set representation: features"
                )
            return wanted
        if target.representation == "pixels":
            return 3 * self.stride**2
        plain = target.dense and target.decoder != "projector"
        return self.student.backbone.width if plain else model.global_head.width

    def predict_dense(
        self, target: Target, features: Tensor, role: Role, mixed: MixedBatch
    ) -> Tensor:
        """z_hat_y of a dense target, (B, M, D): by mask tokens at its positions, or by tokens."""
        if target.tokenwise:
            return self._predict_tokenwise(target, features, role)
        crop = mixed.crop(role.view, role.sample)
        grid = self.grid_of(mixed)
        own = relative_positions(*crop, *crop, grid)  # (B, N, 4)
        wanted = own
        if target.view == "other":
            other = mixed.crop(target_view("other", role.view), role.sample)
            wanted = relative_positions(*crop, *other, grid)
        elif self.objective.masked_positions(target):
            wanted = take(wanted, role.hidden)
        parts, name = self._predictor_of(target)
        own, wanted = (on_trained_grid(at, grid, self.position_side) for at in (own, wanted))
        return parts[name](take(features, role.visible), take(own, role.visible), wanted)

    def _predict_tokenwise(self, target: Target, features: Tensor, role: Role) -> Tensor:
        """Each token predicts one patch: visible tokens in another view, else those in the loss."""
        if target.view == "other":
            features = take(features, role.visible)
        elif self.objective.masked_positions(target):
            features = take(features, role.hidden)
        if target.decoder == "linear" or target.frozen:
            parts, name = self._predictor_of(target)
            return parts[name](features)
        assert self.student.dense_projector is not None  # built when a target has one
        projected = self.student.dense_projector(features)
        return self.dense_predictor(projected) if hasattr(self, "dense_predictor") else projected

    def predict_global(self, target: Target, pooled: Tensor) -> Tensor:
        """z_hat_y of a global target, (B, G), from the pool of the image's own tokens (B, E)."""
        if target.frozen:
            parts, name = self._predictor_of(target)
            return parts[name](pooled)
        assert self.student.projector is not None  # built when a target is global
        projected = self.student.projector(pooled)
        return self.predictor(projected) if hasattr(self, "predictor") else projected

    def predict_text(self, pooled: Tensor) -> Tensor:
        """z_hat_y of a text target, unit length (B, T), from the image's pooled tokens (B, E)."""
        return normalise(self.text_projection(pooled), "l2")


def _sizes(model: Model) -> dict[str, Any]:
    """What an image decoder is built with; positions are rescaled outside of it."""
    return model.decoder.model_dump(exclude={"position_grid"})
