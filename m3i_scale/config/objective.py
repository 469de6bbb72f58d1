"""The objective as configuration: input, target groups, balance.

What can be combined is decided here and in `target`; docs/methods.md explains the keys to those
who write methods.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from m3i_scale.config.likelihoods import Gaussian
from m3i_scale.config.target import Target
from m3i_scale.config.types import BelowOne, Count, Node, Positive


class Input(Node):
    """What the student sees: the clean input view, a masked one, or a mix of two images.

    `pairing` says which image a mix takes for image j: its neighbour in the stream, a shuffled one
    of the micro-batch, or the other view of image i itself. With `both_views` each view is once
    the input and once the target, and the loss is the mean of both.
    """

    corruption: Literal["none", "mask", "mix"] = "mix"
    """The clean view, a masked one, or a mix of two images."""
    mask: Literal["block", "random"] = "block"
    """Rectangles, or single patches."""
    patch: Count = 16
    """Side of a mask patch in pixels: a multiple of the backbone's stride."""
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of hidden patches, exactly."""
    pairing: Literal["neighbours", "shuffled", "self"] = "neighbours"
    """Which image a mix takes for image j."""
    both_views: bool = False
    """Each view is once the input and once the target; twice the computation."""


class Balance(Node):
    """`lambda = gamma g_ssp / g_sp`, `g` moving averages of gradient norms at the features.

    `maximum` bounds lambda, which grows without end where the supervised gradient vanishes.
    """

    gamma: Positive = 1.0
    """Factor of lambda (Table 13)."""
    decay: BelowOne = 0.99
    """Of the moving averages."""
    maximum: Positive | None = None
    """Bound of lambda; null: none."""


class Objective(Node):
    """Input and list of target groups; `L = sum_k -log P_k(z_k | z_hat_k)`.

    `without_source` says what becomes of text and category targets for which no data source has
    supervision: one file of M3I then serves captions alone, categories alone and both.
    """

    input: Input = Input()
    """What the student sees."""
    targets: list[Target] = Field(min_length=1)
    """The target groups."""
    without_source: Literal["refuse", "drop"] = "refuse"
    """What becomes of text and category targets that no source supplies: refuse the run, or drop
    them.
    """
    balance: Balance | None = Balance()
    """How L_SP is weighted; null: by 1."""
    negatives: Literal["micro_step", "batch"] = "micro_step"
    """Where a sample's negatives, and all else that a loss knows of other samples (centre,
    decorrelation), come from: the micro-step on all ranks, or the whole accumulated batch, at the
    cost of a second forward pass.
    """

    @property
    def representations(self) -> set[str]:
        """What the targets are: "pixels", "features", "gram", "global", "text",
        "category"."""
        return {target.representation for target in self.targets}

    @property
    def pooled(self) -> bool:
        """Whether some target is predicted from the pooled vector; else nothing trains the pool."""
        return any(target.pooled for target in self.targets)

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher makes some target; else a run has none."""
        return any(target.encoded and target.encoder == "teacher" for target in self.targets)

    @property
    def contrastive(self) -> bool:
        """Whether samples of a target are told apart."""
        return any(
            target.regularisation == "negatives" and target.representation != "category"
            for target in self.targets
        )

    @property
    def two_views(self) -> bool:
        """Whether anything uses another view of image i or j than the input's."""
        mixed_with_itself = self.input.corruption == "mix" and self.input.pairing == "self"
        other = any(target.view == "other" for target in self.targets)
        return other or mixed_with_itself or self.input.both_views

    @property
    def frozen_teachers(self) -> list[str]:
        """Names of those that some target asks for, in the order of the targets."""
        return list(dict.fromkeys(target.encoder for target in self.targets if target.frozen))

    def runs_twice(self, micro_steps: int) -> bool:
        """Whether the micro-batches of a step run first without and then with gradient."""
        across = any(target.across for target in self.targets)
        return self.negatives == "batch" and micro_steps > 1 and across

    def masked_positions(self, target: Target) -> bool:
        """Whether a dense loss covers the masked patches only.

        `positions: auto` does in the view that the input shows, and covers all in another.
        """
        auto = target.positions == "auto" and target.dense and target.view == "same"
        return target.positions == "masked" or (auto and self.input.corruption != "none")

    def without(self, representations: set[str]) -> Objective:
        """The same without targets of these representations.

        Raises:
            ValueError: what is left is impossible.
        """
        kept = [t for t in self.targets if t.representation not in representations]
        return self.model_copy(update={"targets": kept})._checked()

    @model_validator(mode="after")
    def _possible(self) -> Objective:
        return self._checked()

    def _checked(self) -> Objective:
        problem = next((why for bad, why in self._impossible() if bad), None)
        if problem:
            raise ValueError(problem)
        return self

    def _impossible(self) -> Iterable[tuple[bool, str]]:
        yield (
            not self.targets,
            "no target is left, for no data source has what they ask for; add one to data.sources "
            "or train by another objective",
        )
        names = [target.name for target in self.targets]
        yield len(set(names)) < len(names), f"target names must differ, got {names}"
        for target in self.targets:
            yield (
                target.image == "j" and self.input.corruption != "mix",
                f"target {target.name!r} is of image j, which only a mix contains; "
                "set input.corruption: mix or image: i",
            )
            yield (
                target.positions == "masked" and self.input.corruption == "none",
                f"target {target.name!r} asks for masked positions of an unmasked input; "
                "set input.corruption: mask or mix, or positions: all",
            )
            local = getattr(target.likelihood, "candidates", None) == "local"
            yield (
                local and self.negatives == "batch",
                f"target {target.name!r} has likelihood.candidates: local, those of one micro-step "
                "on one rank; set candidates: global or objective.negatives: micro_step",
            )
        for what in self.representations:
            likelihoods = [t.likelihood for t in self.targets if t.representation == what]
            scales = {
                (w.form, w.temperature, w.learnable, getattr(w, "bias", None))
                for w in likelihoods
                if not isinstance(w, Gaussian)
            }
            yield (
                len(scales) > 1,
                f"all {what} targets that are told apart share one likelihood.form, temperature "
                f"and bias (and whether they are learnable), got {sorted(scales, key=str)}",
            )
        yield (
            self.balance is not None and len({target.supervised for target in self.targets}) < 2,
            "balance weighs self-supervised against supervised targets and only one kind is "
            "present; set objective.balance: null",
        )
