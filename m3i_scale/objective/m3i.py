"""M3I: one input, a list of target groups, `L = sum_k -log P_k(z_y^k | z_hat_y^k)`.

Three things, in the order of the forward pass: outputs of the target encoders, outputs of the
online encoder, named losses. Which groups there are is configuration (`config.Objective`): the M3I
of the paper is image i (same view), image j (other view), text and category of both; each row of
the paper's Table 1 is another list.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

from m3i_scale.config import Boltzmann, Gaussian, Model, Objective, Target
from m3i_scale.models.backbone import build_backbone
from m3i_scale.models.category_head import CategoryHead
from m3i_scale.models.heads import MLP, Temperature
from m3i_scale.models.image_decoder import ImageDecoder
from m3i_scale.models.layers import XavierLinear
from m3i_scale.models.positions import relative_positions
from m3i_scale.models.text_tower import TextTower
from m3i_scale.objective.balance import GradientProbe
from m3i_scale.objective.collectives import gather, own_columns
from m3i_scale.objective.inputs import Scene
from m3i_scale.objective.likelihoods import boltzmann, decorrelation, gaussian, normalise
from m3i_scale.objective.masks import PatchMask


class Role(NamedTuple):
    """One image of the mix: which sample it is, and which tokens of the input show it."""

    sample: Tensor  # int64 (B,): row of the batch the image comes from
    seen: Tensor  # bool (B, N)
    visible: Tensor  # int64 (B, V): indices of the seen tokens
    hidden: Tensor  # int64 (B, N - V): indices of the others


class Encoding(NamedTuple):
    """What a target encoder says of a clean view."""

    features: Tensor  # (B, N, D)
    pooled: Tensor | None  # (B, G), where a target is global


class Targets(NamedTuple):
    """Outputs of all target encoders, rows in batch order."""

    images: dict[tuple[str, str], Encoding]  # by (encoder, view)
    texts: Tensor | None  # (B, E), unit length


class Term(NamedTuple):
    """One group's loss (mean over the batch) and its figures, each a pair (sum, count)."""

    loss: Tensor
    figures: dict[str, Tensor]


class Encoder(nn.Module):
    """The image backbone, and the projector of global targets where there is one."""

    def __init__(self, model: Model, *, projector: bool) -> None:
        super().__init__()
        self.backbone = build_backbone(model.backbone.name, **model.backbone.options)
        head = model.global_head
        self.projector = (
            MLP(self.backbone.embed_dim, head.hidden, head.width) if projector else None
        )


class M3I(nn.Module):
    """All networks of one objective; the forward pass gives its loss.

    Args:
        model: sizes of the networks.
        objective: input corruption and target groups.
        image_size: side of the square views, in pixels.

    Raises:
        ValueError: the mask patch does not fit the backbone's stride or the image.
    """

    def __init__(self, model: Model, objective: Objective, image_size: int) -> None:
        super().__init__()
        self.objective = objective
        wanted = {target.representation for target in objective.targets}
        self.online = Encoder(model, projector="global" in wanted)
        # Encoders that must run on clean views, and on which: (encoder, view).
        self.encodings: list[tuple[str, str]] = sorted(
            {
                (t.encoder, t.view)
                for t in objective.targets
                if t.representation in ("features", "global")
            }
        )
        if any(encoder == "momentum" for encoder, _ in self.encodings):
            self.momentum = Encoder(model, projector="global" in wanted).requires_grad_(False)
        backbone = self.online.backbone
        if all(target.dense for target in objective.targets):
            backbone.pooling.requires_grad_(False)  # no target reaches it
        self.grid: tuple[int, int] = backbone.grid_size(image_size, image_size)
        self.tokens_per_patch = _tokens_per_patch(objective.input.patch, backbone.stride)
        self.hidden_tokens = _hidden_tokens(objective, image_size, self.tokens_per_patch)
        self.stride: int = backbone.stride

        widths = {"features": backbone.width, "pixels": 3 * backbone.stride**2}
        self.decoders = nn.ModuleDict(
            {
                what: ImageDecoder(backbone.width, **model.decoder.model_dump(), out_width=width)
                for what, width in widths.items()
                if what in wanted
            }
        )
        if "global" in wanted and model.global_head.predictor:
            head = model.global_head
            self.predictor = MLP(head.width, head.hidden, head.width)
        if "text" in wanted:
            assert model.text is not None  # Config refuses a text target without model.text
            self.text_tower = TextTower(**model.text.model_dump(exclude={"tokenizer"}))
            self.text_projection = XavierLinear(backbone.embed_dim, model.text.embed_dim)
        if "category" in wanted:
            self.category_head = CategoryHead(backbone.embed_dim, model.categories)
        self.temperatures = nn.ModuleDict(
            {
                target.representation: Temperature(law.temperature, law.learnable)
                for target in objective.targets
                if isinstance(law := target.likelihood, Boltzmann)
            }
        )
        self.probe = GradientProbe()

    def train(self, mode: bool = True) -> M3I:
        """Set the mode; the momentum encoder has no drop-path in either."""
        super().train(mode)
        if hasattr(self, "momentum"):
            self.momentum.eval()
        return self

    def forward(self, scene: Scene, supervised_weight: float = 1.0) -> dict[str, Tensor]:
        """The loss of one micro-batch of this rank, under "loss", and figures as (sum, count).

        `supervised_weight` is lambda of `L = L_SSP + lambda L_SP`. Averaged over ranks, gradients
        are those of the loss of the global batch.
        """
        targets = self.target_outputs(scene)
        features = self.online.backbone.features(scene.image)  # z_x (B, N, D)
        for_ssp, for_sp = self.probe.split(features)
        roles = self.roles(scene)
        terms = {
            target.name: self._term(
                target,
                for_sp if target.supervised else for_ssp,
                roles[target.image],
                scene,
                targets,
            )
            for target in self.objective.targets
        }
        zero = features.new_zeros((), dtype=torch.float32)
        l_ssp = sum(
            (t.weight * terms[t.name].loss for t in self.objective.targets if not t.supervised),
            zero,
        )
        l_sp = sum(
            (t.weight * terms[t.name].loss for t in self.objective.targets if t.supervised), zero
        )
        loss = l_ssp + supervised_weight * l_sp
        self.probe.watch_total(loss)
        figures = {
            f"{key}/{name}": value
            for name, term in terms.items()
            for key, value in term.figures.items()
        }
        return {"loss": loss, **figures}

    def target_outputs(self, scene: Scene) -> Targets:
        """z_y: encodings of the clean views and the texts, for the groups that need them."""
        images: dict[tuple[str, str], Encoding] = {}
        for encoder in dict.fromkeys(encoder for encoder, _ in self.encodings):
            views = [view for other, view in self.encodings if other == encoder]
            for view, encoding in zip(views, self._encode(encoder, views, scene), strict=True):
                images[encoder, view] = encoding
        texts = None
        if hasattr(self, "text_tower"):
            texts = normalise(self.text_tower(scene.tokens, scene.token_mask), "l2")
        return Targets(images, texts)

    def _encode(self, encoder: str, views: list[str], scene: Scene) -> list[Encoding]:
        """Encode clean views, all in one pass: sharded weights are gathered once."""
        networks = self.momentum if encoder == "momentum" else self.online
        image = torch.cat([scene.clean(view) for view in views])
        with torch.no_grad() if encoder == "momentum" else contextlib.nullcontext():
            features = networks.backbone.features(image).chunk(len(views))
            if networks.projector is None:
                return [Encoding(z, None) for z in features]
            pooled = networks.projector(networks.backbone.pool(torch.cat(features)))
        return [Encoding(z, p) for z, p in zip(features, pooled.chunk(len(views)), strict=True)]

    def roles(self, scene: Scene) -> dict[str, Role]:
        """Which tokens show image i and which image j."""
        k = self.tokens_per_patch
        seen = scene.seen.repeat_interleave(k, 1).repeat_interleave(k, 2).flatten(1)  # (B, N)
        # Seen tokens first, in row-major order; their number is the same in every row.
        order = torch.argsort((~seen).to(torch.uint8), dim=1, stable=True)
        first, last = order.split([order.shape[1] - self.hidden_tokens, self.hidden_tokens], dim=1)
        own = torch.arange(len(seen), device=seen.device)
        return {"i": Role(own, seen, first, last), "j": Role(scene.partner, ~seen, last, first)}

    def predict_dense(self, target: Target, features: Tensor, role: Role, scene: Scene) -> Tensor:
        """z_hat_y of a dense target: the decoder on visible tokens and positions, (B, M, D)."""
        box, flip = scene.box_a[role.sample], scene.flip_a[role.sample]
        own = relative_positions(box, flip, box, flip, self.grid)  # (B, N, 4)
        wanted = own
        if target.view == "other":
            other_box, other_flip = scene.box_b[role.sample], scene.flip_b[role.sample]
            wanted = relative_positions(box, flip, other_box, other_flip, self.grid)
        if target.positions == "masked":
            wanted = _take(wanted, role.hidden)
        decoder = self.decoders[target.representation]
        return decoder(_take(features, role.visible), _take(own, role.visible), wanted)

    def predict_global(self, features: Tensor, role: Role) -> Tensor:
        """z_hat_y of a global target: projected pool of the image's own tokens, (B, G)."""
        pooled = self.online.backbone.pool(features, role.seen)
        assert self.online.projector is not None  # built when a target is global
        projected = self.online.projector(pooled)
        return self.predictor(projected) if hasattr(self, "predictor") else projected

    def predict_text(self, features: Tensor, role: Role) -> Tensor:
        """z_hat_y of a text target: projected pool of the image's tokens, unit length (B, E)."""
        pooled = self.online.backbone.pool(features, role.seen)
        return normalise(self.text_projection(pooled), "l2")

    def _term(
        self, target: Target, features: Tensor, role: Role, scene: Scene, targets: Targets
    ) -> Term:
        if target.representation == "category":
            return self._category_term(target, features, role, scene)
        if target.representation == "text":
            assert targets.texts is not None
            z_hat = self.predict_text(features, role)
            return self._softmax_term(
                target, z_hat, targets.texts[role.sample], scene.has_text[role.sample]
            )
        if target.dense:
            z_hat = self.predict_dense(target, features, role, scene)
            z = self._dense_target(target, scene, targets)[role.sample]  # (B, N, D)
            if target.positions == "masked":
                z = _take(z, role.hidden)
        else:
            z_hat = self.predict_global(features, role)
            z = targets.images[target.encoder, target.view].pooled[role.sample]  # type: ignore[index]
        return self._self_supervised_term(target, z_hat, z)

    def _dense_target(self, target: Target, scene: Scene, targets: Targets) -> Tensor:
        if target.representation == "features":
            return targets.images[target.encoder, target.view].features
        return patchify(scene.clean(target.view), self.stride)

    def _self_supervised_term(self, target: Target, z_hat: Tensor, z: Tensor) -> Term:
        """Image targets: z_hat and z are (B, M, D) or (B, D)."""
        if target.guard == "stop_gradient":
            z = z.detach()
        if target.guard == "decorrelation":
            loss = decorrelation(gather(z_hat), gather(z), weight=target.decorrelation_weight)
            return Term(loss, {"loss": _figure(loss), "spread": _figure(_spread(z))})
        z = normalise(z, target.normalise)
        z_hat = normalise(z_hat, "l2" if target.normalise == "l2" else "none")
        law = target.likelihood
        if isinstance(law, Gaussian):
            loss = gaussian(z_hat, z, sigma=law.sigma, over_dimensions=law.over_dimensions).mean()
            term = Term(loss, {"loss": _figure(loss)})
        else:
            rows = z.flatten(0, -2)
            present = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
            term = self._softmax_term(target, z_hat.flatten(0, -2), rows, present)
        return Term(term.loss, {**term.figures, "spread": _figure(_spread(z))})

    def _softmax_term(self, target: Target, z_hat: Tensor, z: Tensor, present: Tensor) -> Term:
        """Boltzmann form over the rows z of all ranks; row n of z_hat belongs to row n of z."""
        law = target.likelihood
        assert isinstance(law, Boltzmann)
        everywhere = law.candidates == "global"
        columns = own_columns(torch.arange(len(z), device=z.device), gathered=everywhere)
        positive = torch.where(present, columns, -1)
        exists = gather(present) if everywhere else present

        def losses_of(rows: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            candidates = gather(candidates) if everywhere else candidates
            scores, tau = self.temperatures[target.representation](rows @ candidates.T)  # (R, C)
            losses = boltzmann(
                scores, positive, candidate_exists=exists, label_smoothing=law.label_smoothing
            )
            return losses, scores.masked_fill(~exists, -torch.inf), tau

        losses, scores, tau = losses_of(z_hat, z)
        if law.symmetric:
            losses = (losses + losses_of(z, z_hat)[0]) / 2
        return _classification_term(losses, scores, positive, tau)

    def _category_term(self, target: Target, features: Tensor, role: Role, scene: Scene) -> Term:
        """Softmax over the classifier's weights, the category embeddings."""
        law = target.likelihood
        assert isinstance(law, Boltzmann)
        pooled = self.online.backbone.pool(features, role.seen)  # (B, E)
        scores, tau = self.temperatures["category"](self.category_head(pooled))  # (B, C)
        positive = scene.category[role.sample]
        losses = boltzmann(scores, positive, label_smoothing=law.label_smoothing)
        return _classification_term(losses, scores, positive, tau)


def patchify(image: Tensor, patch: int) -> Tensor:
    """Pixels of each patch, row-major: (B, 3, H, W) -> (B, H/p * W/p, 3 * p * p)."""
    return nn.functional.unfold(image, patch, stride=patch).transpose(1, 2)


def _tokens_per_patch(patch: int, stride: int) -> int:
    if patch % stride:
        raise ValueError(
            f"objective.input.patch {patch} is not a multiple of the backbone's stride {stride}: a "
            f"token would show both images of a mix; use {stride} or a multiple of it"
        )
    return patch // stride


def _hidden_tokens(objective: Objective, image_size: int, tokens_per_patch: int) -> int:
    spec = objective.input
    if spec.corruption == "none":
        return 0
    side = image_size // spec.patch
    return PatchMask(side, side, spec.ratio, spec.mask).hidden * tokens_per_patch**2


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows of tokens (B, N, D) at index (B, V): (B, V, D)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def _figure(value: Tensor, count: int | Tensor = 1) -> Tensor:
    """A (sum, count) pair, so that means over ranks and steps are exact."""
    value = value.detach().float()
    return torch.stack([value, torch.as_tensor(count, device=value.device).float()])


def _spread(targets: Tensor) -> Tensor:
    """Standard deviation over the samples (first dimension), averaged over all others.

    0 when all images have the same target. Positions are kept apart: a map that depends on the
    position alone is a collapse, too.
    """
    return targets.detach().float().std(0).mean()


def _classification_term(losses: Tensor, scores: Tensor, positive: Tensor, tau: Tensor) -> Term:
    """Absent rows have loss 0 and count in the mean: L is an expectation over samples."""
    present = positive >= 0
    right = (scores.argmax(1) == positive) & present
    figures = {
        "loss": _figure(losses.sum(), present.sum()),
        "accuracy": _figure(right.sum(), present.sum()),
        "temperature": _figure(tau),
    }
    return Term(losses.mean(), figures)
