"""M3I: one input, a list of target groups, `L = sum_k -log P_k(z_y^k | z_hat_y^k)`.

The forward pass computes the outputs of the target encoders (teacher, student, frozen teachers,
text tower), the outputs of the student, and the named losses, in this order. The configuration
lists the groups (`config.Objective`): the paper's M3I has image i (same view), image j (other
view), and text and category of both; each row of the paper's Table 1 is another list.
docs/methods.md maps every term to its place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from m3i_scale.config import Gaussian, Model, Objective, Target
from m3i_scale.models.category_head import CategoryHead
from m3i_scale.models.frozen import FrozenEncoder
from m3i_scale.models.heads import Temperature
from m3i_scale.models.layers import XavierLinear, residual_blocks
from m3i_scale.models.positions import Grid
from m3i_scale.models.stochastic_depth import hash_keys
from m3i_scale.models.text_tower import TextTower
from m3i_scale.objective.balance import GradientProbe
from m3i_scale.objective.clean import Asked, answer
from m3i_scale.objective.contrastive import Candidates, gather_candidates
from m3i_scale.objective.encoder import Encoder, Encoding
from m3i_scale.objective.figures import Term, mean_term, student_figures
from m3i_scale.objective.inputs import MixedBatch
from m3i_scale.objective.likelihoods import gram, normalise
from m3i_scale.objective.predictors import Predictors
from m3i_scale.objective.roles import (
    Role,
    View,
    count_hidden_tokens,
    count_tokens_per_patch,
    find_roles,
    patchify,
    take,
    target_view,
    view_of,
)
from m3i_scale.objective.step_loss import StepLoss
from m3i_scale.objective.terms import (
    Known,
    Pair,
    category_term,
    choose_patches,
    embed,
    image_term,
    text_term,
)

Pool = Callable[[Tensor, Tensor], Tensor]  # tokens (B, N, D), which of them (B, N) -> (B, E)


class Targets(NamedTuple):
    """Outputs of all target encoders, rows in batch order."""

    images: dict[tuple[str, View], Encoding]  # by (encoder, view)
    texts: Tensor | None  # (B, E), unit length
    candidates: Candidates | None  # those of all ranks, where a text target asks for them


class M3I(Predictors):
    """All networks of one objective; the forward pass gives its loss.

    Args:
        model: sizes of the networks.
        objective: input corruption and target groups.
        image_size: side of the square views, in pixels; a batch of smaller views runs, too.
        frozen: the frozen teachers that targets name. They stay outside of the tree of modules:
            no engine shards, trains or saves them. None where nothing is trained or predicted:
            what predicts their targets is left out, too.

    Raises:
        ValueError: the mask patch does not fit the backbone's stride or the image, or a frozen
            teacher has no pooled vector for a global target.
    """

    def __init__(
        self,
        model: Model,
        objective: Objective,
        image_size: int,
        frozen: Mapping[str, FrozenEncoder] | None = None,
    ) -> None:
        super().__init__()
        self.objective = objective
        self.frozen: dict[str, FrozenEncoder] = dict(frozen or {})
        wanted = objective.representations
        self.student = Encoder(model, objective)
        # The views of image i in the input, and (encoder, view) of every encoding of a clean view.
        self.shown: list[View] = ["a", "b"] if objective.input.both_views else ["a"]
        self.encodings = self._encodings(objective.targets)
        if objective.has_teacher:
            self.teacher = Encoder(model, objective).requires_grad_(False)
        backbone = self.student.backbone
        if not objective.pooled:
            backbone.pooling.requires_grad_(False)
        self.grid = backbone.grid_size(image_size, image_size)
        self.position_side = model.decoder.position_grid or self.grid[0]
        self.tokens_per_patch = count_tokens_per_patch(objective.input.patch, backbone.stride)
        count_hidden_tokens(objective.input, image_size, self.tokens_per_patch)  # it is possible
        self.stride = backbone.stride
        self._add_image_heads(model)
        if "text" in wanted:
            assert model.text is not None  # Config refuses a text target without model.text
            self.text_tower = TextTower(**model.text.model_dump(exclude={"tokenizer"}))
            self.text_projection = XavierLinear(backbone.embed_dim, model.text.embed_dim)
        if "category" in wanted:
            self.category_head = CategoryHead(backbone.embed_dim, model.categories)
        self._add_frozen_heads(model)  # last: they change no other weight that is drawn
        self._add_contrastive_state(model)
        self.probe = GradientProbe()

    def upper_bounds(self) -> list[tuple[nn.Parameter, float]]:
        """Parameters that must not stay above a bound after a step of the optimiser.

        Whoever trains clamps them; the forward pass does not.
        """
        return [
            (part.log_scale, part.max_log_scale)
            for part in self.temperatures.values()
            if isinstance(part, Temperature)
            if part.log_scale is not None and part.max_log_scale is not None
        ]

    def train(self, mode: bool = True) -> M3I:
        """Set the mode; the teacher has no drop-path in either."""
        super().train(mode)
        if hasattr(self, "teacher"):
            self.teacher.eval()
        return self

    def separate_teacher(self) -> nn.Module:
        """Take the teacher out of the module tree; the forward pass still uses it.

        An engine that shards the modules of the tree can then keep the teacher whole.
        """
        teacher = self._modules.pop("teacher")
        object.__setattr__(self, "teacher", teacher)
        assert isinstance(teacher, nn.Module)
        return teacher

    def blocks_run_once(self) -> list[nn.Module]:
        """Residual blocks that run at most once with gradient in a forward pass.

        Not the decoder's, which runs for every dense target, nor the student's where it makes
        targets that carry a gradient; the teacher's, where it is in the tree, never have one.
        """
        parts = [self._modules[name] for name in ("text_tower", "teacher") if name in self._modules]
        if not self._trains_targets("student"):
            parts.append(self.student)
        return [block for part in parts if part for _, block in residual_blocks(part)]

    def forward(
        self,
        mixed: MixedBatch | Asked,
        supervised_weight: float = 1.0,
        *,
        step: StepLoss | None = None,
    ) -> dict[str, Tensor]:
        """The loss of one micro-batch of this rank, under "loss", and figures as (sum, count).

        `supervised_weight` is lambda of `L = L_SSP + lambda L_SP`. Averaged over ranks, gradients
        are those of the loss of the global batch. In training mode queues take in the new keys.
        `step` is what the micro-batches of an optimiser step have in common, where samples are
        compared across them; while it collects, it gets the embeddings, and nothing is returned.
        For what evaluation asks the result is `clean.answer`'s.
        """
        if isinstance(mixed, Asked):
            return answer(self, mixed)
        if step is not None and step.collecting:
            self._collect(mixed, step)
            return {}
        outputs = self.target_outputs(mixed, step)  # z_y
        features = self._features(mixed)  # z_x
        for_ssp, for_sp = (z.chunk(len(self.shown)) for z in self.probe.split(features))
        pool: Pool = functools.cache(self.student.backbone.pool)  # once for text and category

        roles = [self.roles(mixed, view) for view in self.shown]
        terms: dict[str, list[Term]] = {target.name: [] for target in self.objective.targets}
        for number, role in enumerate(roles):
            for target in self.objective.targets:
                z_x = (for_sp if target.supervised else for_ssp)[number]
                known = None if step is None else step.known(target, number)
                term = self._term(target, z_x, role[target.image], mixed, outputs, pool, known)
                terms[target.name].append(term)

        zero = features.new_zeros((), dtype=torch.float32)
        l_ssp, l_sp = zero, zero
        figures = student_figures(for_ssp[0], roles[0]["i"].seen)
        for target in self.objective.targets:
            term = mean_term(terms[target.name])
            if target.supervised:
                l_sp = l_sp + target.weight * term.loss
            else:
                l_ssp = l_ssp + target.weight * term.loss
            if self.training and term.keys is not None:
                self.queues[target.name].push(term.keys)  # type: ignore[operator]
            figures |= {f"{key}/{target.name}": value for key, value in term.figures.items()}
        loss = l_ssp + supervised_weight * l_sp
        self.probe.watch_total(loss)
        if step is not None:
            step.advance()
        return {"loss": loss, **figures}

    def _collect(self, mixed: MixedBatch, step: StepLoss) -> None:
        """Leave in `step` what other micro-batches have to know of this one."""
        across = [target for target in self.objective.targets if target.across]
        outputs = self.target_outputs(mixed, step, self._encodings(across))
        step.keep({key: e for key, e in outputs.images.items() if key[0] != "student"})
        shown: Sequence[Tensor | None] = [None] * len(self.shown)
        if any(target.compares or target.match == "similarity" for target in across):
            shown = self._features(mixed).chunk(len(self.shown))
        for number, (view, z_x) in enumerate(zip(self.shown, shown, strict=True)):
            role = self.roles(mixed, view)
            for target in across:
                image, predict, coefficients = role[target.image], target.compares, None
                pool = self.student.backbone.pool
                pair = self._pair(target, z_x, image, mixed, outputs, pool, predict=predict)
                embedding = embed(target, pair, queued=target.name in self.queues)
                if not isinstance(target.likelihood, Gaussian):
                    coefficients = self.temperatures[target.representation](embedding.whole)
                step.collect(target, number, embedding, coefficients)

    def _features(self, mixed: MixedBatch) -> Tensor:
        """z_x of every shown view, one after the other: (V * B, N, D)."""
        keys = torch.cat([_draw_key(mixed, "input", view) for view in self.shown])
        return self.student.backbone.features(mixed.image, keys)

    def target_outputs(
        self,
        mixed: MixedBatch,
        step: StepLoss | None = None,
        encodings: Sequence[tuple[str, View]] | None = None,
    ) -> Targets:
        """z_y: encodings of the clean views and the texts, for the groups that need them.

        Of `encodings`, all by default, those that `step` has kept are taken from there.
        """
        encodings = self.encodings if encodings is None else encodings
        images: dict[tuple[str, View], Encoding] = {} if step is None else dict(step.kept)
        encodings = [each for each in encodings if each not in images]
        for encoder in dict.fromkeys(encoder for encoder, _ in encodings):
            views = [view for other, view in encodings if other == encoder]
            for view, encoding in zip(views, self._encode(encoder, views, mixed), strict=True):
                images[encoder, view] = encoding
        texts = None
        if hasattr(self, "text_tower"):
            texts = normalise(self.text_tower(mixed.tokens, mixed.token_mask), "l2")
        candidates = self._text_candidates(texts, mixed) if step is None else None
        return Targets(images, texts, candidates)

    def _text_candidates(self, texts: Tensor | None, mixed: MixedBatch) -> Candidates | None:
        """The texts of all ranks, gathered once for all groups."""
        likelihoods = [t.likelihood for t in self.objective.targets if t.representation == "text"]
        wanted = any(
            not isinstance(likelihood, Gaussian) and likelihood.candidates == "global"
            for likelihood in likelihoods
        )
        if texts is None or not wanted:
            return None
        return gather_candidates(texts, mixed.has_text)

    def _encode(self, encoder: str, views: list[View], mixed: MixedBatch) -> list[Encoding]:
        """Encode clean views, all in one pass: sharded weights are gathered once."""
        image = torch.cat([mixed.clean(view) for view in views])
        if encoder not in ("teacher", "student"):
            return self._encode_frozen(encoder, image, len(views), self.grid_of(mixed))
        networks = self.teacher if encoder == "teacher" else self.student
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._trains_targets(encoder)):
            keys = torch.cat([_draw_key(mixed, "target", view) for view in views])
            parts = networks.encode(image, keys)
        return _by_view(parts, len(views))

    def _encode_frozen(self, name: str, image: Tensor, views: int, grid: Grid) -> list[Encoding]:
        """What a frozen teacher says of images (V * B, 3, H, W), for the groups that ask for it."""
        tokens, pooled = self.frozen[name](image, grid)
        asked = {not t.pooled for t in self.objective.targets if t.frozen and t.encoder == name}
        parts = Encoding(tokens if True in asked else None, pooled, None)
        return _by_view(parts if False in asked else parts._replace(pooled=None), views)

    def _trains_targets(self, encoder: str) -> bool:
        """Whether some target of this encoder carries a gradient."""
        targets = self.objective.targets
        return encoder == "student" and any(t.encoded and t.trains_target for t in targets)

    def _encodings(self, targets: Sequence[Target]) -> list[tuple[str, View]]:
        """(encoder, view) of every clean view that an encoder must see for these targets."""
        spec = self.objective.input
        return sorted(
            {
                (t.encoder, target_view(t.view, view_of(t.image, view, spec)))
                for t in targets
                if t.encoded
                for view in self.shown
            }
        )

    def roles(self, mixed: MixedBatch, shown: View = "a") -> dict[str, Role]:
        """Which tokens show image i and which image j, in the input that shows this view of i."""
        spec, size = self.objective.input, mixed.clean_a.shape[-1]
        hidden = count_hidden_tokens(spec, size, self.tokens_per_patch)
        return find_roles(mixed, shown, spec, hidden, self.tokens_per_patch)

    def _pair(
        self,
        target: Target,
        z_x: Tensor | None,
        role: Role,
        mixed: MixedBatch,
        outputs: Targets,
        pool: Pool,
        *,
        predict: bool = True,
    ) -> Pair:
        """Predictions, from z_x (B, N, D), and targets of any group but a category's.

        Without predictions z_x is read by `match: similarity` alone.
        """
        z_hat = chosen = present = None
        if target.representation == "text":
            assert z_x is not None  # texts are compared, and so predicted
            assert outputs.texts is not None  # the text tower is there where a target wants it
            z_hat, present = self.predict_text(pool(z_x, role.seen)), mixed.has_text[role.sample]
            return Pair(z_hat, outputs.texts[role.sample], None, present)
        view = target_view(target.view, role.view)
        encoding = outputs.images[target.encoder, view] if target.encoded else None
        if target.representation == "gram":
            assert encoding is not None  # a gram target has an encoder
            z_y = gram(take(encoding.target(target)[role.sample], role.visible))
            return Pair(None if z_x is None else gram(take(z_x, role.visible)), z_y)
        z_y = encoding.target(target) if encoding else patchify(mixed.clean(view), self.stride)
        if target.dense:
            others = encoding.features if encoding else None
            others = None if others is None else others[role.sample]
            masked = self.objective.masked_positions(target)
            chosen, present = choose_patches(
                target, role, view, mixed, self.grid_of(mixed), z_x, others, masked=masked
            )
        if predict:
            assert z_x is not None
            dense = target.dense
            z_hat = (
                self.predict_dense(target, z_x, role, mixed)
                if dense
                else self.predict_global(target, pool(z_x, role.seen))
            )
        return Pair(z_hat, z_y[role.sample], chosen, present)

    def _term(
        self,
        target: Target,
        z_x: Tensor,
        role: Role,
        mixed: MixedBatch,
        outputs: Targets,
        pool: Pool,
        known: Known | None,
    ) -> Term:
        """The loss of one group about one image of the input, from z_x (B, N, D)."""
        temperature = _part(self.temperatures, target.representation)
        if target.representation == "category":
            pooled = pool(z_x, role.seen)  # (B, E)
            category = mixed.category[role.sample]
            return category_term(target, pooled, self.category_head(pooled), category, temperature)
        pair = self._pair(target, z_x, role, mixed, outputs, pool)
        if target.representation == "text":
            return text_term(target, pair, role.sample, temperature, outputs.candidates, known)
        return image_term(
            target,
            pair,
            temperature,
            _part(self.queues, target.name),
            _part(self.running_centres, target.name),
            known,
        )


def _draw_key(mixed: MixedBatch, use: Literal["input", "target"], view: View) -> Tensor:
    """What the student draws from (B,): an image in the input draws anew when it is a target."""
    uses = [("input", "a"), ("input", "b"), ("target", "a"), ("target", "b")]
    return hash_keys(mixed.key, uses.index((use, view)))


def _by_view(parts: Encoding, views: int) -> list[Encoding]:
    """Encodings of several views, one after the other in rows, as one encoding each."""
    none = [None] * views
    chunks = (none if part is None else part.chunk(views) for part in parts)
    return [Encoding(*of_view) for of_view in zip(*chunks, strict=True)]


def _part(parts: nn.ModuleDict, name: str) -> Any:
    """The module of that name, or None."""
    return parts._modules.get(name)
