"""The objective as configuration: input, target groups, likelihoods, balance.

What can be combined is decided here; docs/methods.md explains the keys to those who write methods.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from m3i_scale.config.types import BelowOne, Count, Node, Positive

LEAST_TEMPERATURE = 0.01  # of those that are learned, as in CLIP


class Gaussian(Node):
    """`||z - z_hat||^2 / (2 sigma^2)`, averaged or summed over the feature dimensions."""

    form: Literal["gaussian"] = "gaussian"
    """Names this likelihood."""
    sigma: Positive = 0.5**0.5
    """Standard deviation; the default makes it the squared error."""
    over_dimensions: Literal["mean", "sum"] = "mean"
    """How feature dimensions are reduced."""


class Boltzmann(Node):
    """`-log softmax(z_hat . z / tau)` over the other targets.

    These are the targets of the micro-batch, or of the batch (`objective.negatives`), on all ranks
    (`candidates: global`) or of the micro-batch on this one (`local`), and the last `queue` keys of
    batches before; with `own`, the queue alone.
    """

    form: Literal["boltzmann"] = "boltzmann"
    """Names this likelihood."""
    temperature: Positive = 0.07
    """tau; its start value if it is learnable."""
    learnable: bool = False
    """Whether the temperature is trained."""
    symmetric: bool = False
    """Also tell predictions apart by targets; the loss is the mean of both."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability spread over all candidates."""
    candidates: Literal["global", "local", "own"] = "global"
    """Targets of the micro-batch on all ranks, of this rank, or the sample's own only."""
    queue: Annotated[int, Field(ge=0)] = 0
    """Number of earlier targets that are negatives, too."""

    @model_validator(mode="after")
    def _possible(self) -> Boltzmann:
        if self.learnable and self.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"a learned temperature stays above {LEAST_TEMPERATURE} and cannot start at "
                f"{self.temperature}; set a larger temperature or learnable: false"
            )
        return self


Normalisation = Literal["none", "layer_norm", "instance_norm", "l2", "norm_pix"]


class Target(Node):
    """One target group: what is predicted, from whose tokens, under which likelihood.

    The columns are those of the method's Table 1: target data (`image`, `view`), target
    representation, `regularisation` and form of the distribution (`likelihood`).
    docs/methods.md explains every key.
    """

    name: Annotated[str, Field(pattern=r"^[\w-]+$")]
    """Name of the group in metrics."""
    image: Literal["i", "j"] = "i"
    """Whose target: image i or, in a mix, image j."""
    view: Literal["same", "other"] = "same"
    """The view that the input shows, or the other one."""
    representation: Literal["pixels", "features", "global", "text", "category"]
    """What is predicted."""
    regularisation: Literal["none", "stop_gradient", "negatives", "decorrelation"] = "none"
    """What keeps learned targets from becoming all alike."""
    encoder: Literal["teacher", "student"] = "teacher"
    """Who encodes `features` and `global` targets."""
    decoder: Literal["transformer", "linear", "projector"] = "transformer"
    """How dense targets are predicted: by mask tokens, or from each token by a linear layer or an
    MLP.
    """
    match: Literal["position", "similarity"] = "position"
    """How tokens are paired with patches of the other view."""
    likelihood: Annotated[Gaussian | Boltzmann, Field(discriminator="form")]
    """The form of P(target given prediction)."""
    positions: Literal["auto", "masked", "all"] = "auto"
    """Patches that a dense loss covers; `auto`: hidden ones in the input's view, all in another."""
    normalise: Normalisation = "none"
    """Of the target."""
    centre: Literal["none", "batch", "running"] = "none"
    """What of `layer_norm` targets is taken out: the mean of the batch, or a running one."""
    centre_decay: BelowOne = 0.9
    """Of the averages of `centre: running`, per micro-step."""
    normalise_prediction: Normalisation | None = None
    """Of the prediction; null: l2 where the target has it, else none."""
    weight: Positive = 1.0
    """Factor of the group's loss."""
    decorrelation: Literal["barlow_twins", "unigrad"] = "barlow_twins"
    """Its kind, where `regularisation` is `decorrelation`."""
    decorrelation_weight: Positive | None = None
    """Factor of the off-diagonal, or of the added term; null: 0.005 and 0.02."""

    @property
    def dense(self) -> bool:
        """Whether there is one target per patch."""
        return self.representation in ("pixels", "features")

    @property
    def supervised(self) -> bool:
        """Whether the group belongs to L_SP (text, category) rather than to L_SSP."""
        return self.representation in ("text", "category")

    @property
    def encoded(self) -> bool:
        """Whether an image encoder makes the target."""
        return self.representation in ("features", "global")

    @property
    def trains_target(self) -> bool:
        """Whether the target's side carries a gradient to an encoder."""
        student = self.encoded and self.encoder == "student"
        text = self.representation == "text"
        return text or (student and self.regularisation != "stop_gradient")

    @property
    def correlates(self) -> bool:
        """Whether UniGrad's correlation of all targets enters the loss."""
        return self.regularisation == "decorrelation" and self.decorrelation == "unigrad"

    @property
    def compares(self) -> bool:
        """Whether the loss of a sample has a gradient to the embeddings of others."""
        if self.likelihood.form == "boltzmann":
            return self.representation != "category"
        return self.regularisation == "decorrelation" and not self.correlates

    @property
    def across(self) -> bool:
        """Whether the loss of a sample depends on others at all."""
        return self.compares or self.correlates or self.centre != "none"

    @property
    def tokenwise(self) -> bool:
        """Whether each token of the input predicts one target patch, without mask tokens."""
        return self.dense and self.decoder != "transformer"

    @property
    def redundancy_weight(self) -> float:
        """`decorrelation_weight`, or what Barlow Twins, and SiameseIM with UniGrad, published."""
        if self.decorrelation_weight is not None:
            return self.decorrelation_weight
        return 0.02 if self.decorrelation == "unigrad" else 0.005

    @property
    def prediction_normalisation(self) -> Normalisation:
        """How predictions are normalised."""
        if self.normalise_prediction is not None:
            return self.normalise_prediction
        return "l2" if self.normalise == "l2" else "none"

    @model_validator(mode="after")
    def _possible(self) -> Target:
        rules = (self._regularisations(), self._columns(), self._decoders(), self._queues())
        problem = next((why for rule in rules for bad, why in rule if bad), None)
        if problem:
            raise ValueError(f"target {self.name!r}: {problem}")
        return self

    def _regularisations(self) -> Iterable[tuple[bool, str]]:
        gaussian = self.likelihood.form == "gaussian"
        regularisation, what = self.regularisation, self.representation
        yield (
            regularisation == "negatives" and gaussian,
            "negatives enter through a softmax; set likelihood.form: boltzmann",
        )
        yield (
            self.supervised and (gaussian or regularisation != "negatives"),
            f"a {what} target is told from the other {what} targets; set "
            "regularisation: negatives and likelihood.form: boltzmann",
        )
        yield (
            what == "pixels" and (regularisation != "none" or not gaussian),
            "pixels cannot collapse; set regularisation: none and likelihood.form: gaussian",
        )
        yield (
            self.encoded and regularisation == "none",
            "a learned target without regularisation collapses; set regularisation: "
            "stop_gradient, negatives or decorrelation",
        )
        yield (
            regularisation == "decorrelation" and not gaussian,
            "decorrelation is a regularisation of the Gaussian form; set likelihood.form: gaussian",
        )
        yield (
            regularisation == "decorrelation"
            and self.decorrelation == "barlow_twins"
            and (what != "global" or self.normalise != "none"),
            "the decorrelation of Barlow Twins standardises global features itself; set "
            "representation: global and normalise: none, or decorrelation: unigrad",
        )

    def _columns(self) -> Iterable[tuple[bool, str]]:
        yield (
            self.supervised and (self.view != "same" or self.normalise != "none"),
            f"a {self.representation} has no view and its embedding no other normalisation; leave "
            "view and normalise out",
        )
        yield (
            self.positions == "masked" and (not self.dense or self.view != "same"),
            "only dense targets in the input view (view: same) have masked positions; set "
            "positions: all",
        )
        yield (
            self.normalise == "norm_pix" and self.representation != "pixels",
            "norm_pix standardises the pixels of a patch; set normalise: layer_norm",
        )
        yield (
            self.normalise == "instance_norm" and not self.dense,
            f"instance_norm is over the patches of an image, and a {self.representation} target "
            "has none; set normalise: layer_norm or l2",
        )
        yield (
            self.normalise_prediction == "instance_norm",
            "instance_norm needs all patches of an image, and predictions are of some; leave "
            "normalise_prediction out",
        )

        yield (
            self.centre != "none" and self.normalise != "layer_norm",
            "centre takes the mean out of standardised targets; set normalise: layer_norm, or "
            "centre: none",
        )

    def _decoders(self) -> Iterable[tuple[bool, str]]:
        yield (
            not self.dense and self.decoder != "transformer",
            f"a {self.representation} target has no positions that a decoder could predict; leave "
            "decoder out (for global targets see model.global_head)",
        )
        yield (
            self.decoder == "projector" and self.representation == "pixels",
            "the projector maps both sides, and pixels are no features; set decoder: linear or "
            "transformer",
        )
        yield (
            self.match == "similarity" and not (self.tokenwise and self.view == "other"),
            "matching by similarity pairs tokens of two views; set view: other and decoder: "
            "projector or linear, or match: position",
        )
        yield (
            self.match == "similarity" and self.representation != "features",
            "similarity is that of features; set representation: features or match: position",
        )

    def _queues(self) -> Iterable[tuple[bool, str]]:
        likelihood = self.likelihood
        if isinstance(likelihood, Gaussian):
            return
        yield (
            likelihood.candidates == "own" and not likelihood.queue,
            "its own target is the only candidate, so that nothing is told apart; set "
            "likelihood.queue, or candidates: global",
        )
        yield (
            likelihood.queue > 0 and not (self.encoded and self.encoder == "teacher"),
            "a queue needs targets that change slowly; set encoder: teacher and representation: "
            "global or features, or queue: 0",
        )
        yield (
            likelihood.queue > 0 and self.normalise == "instance_norm",
            "the queue of a dense group holds means over patches, which instance_norm makes zero; "
            "set normalise: l2 or queue: 0",
        )
        yield (
            likelihood.queue > 0 and self.centre != "none",
            "the queue holds targets of batches with other centres; set centre: none or queue: 0",
        )
        yield (
            likelihood.queue > 0 and likelihood.symmetric,
            "the queue holds targets and no predictions, so that the other direction has no "
            "negatives; set likelihood.symmetric: false or queue: 0",
        )


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
        """What the targets are: "pixels", "features", "global", "text", "category"."""
        return {target.representation for target in self.targets}

    @property
    def pooled(self) -> bool:
        """Whether some target is predicted from the pooled vector; else nothing trains the pool."""
        return any(not target.dense for target in self.targets)

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher makes some target; else a run has none."""
        return any(target.encoded and target.encoder == "teacher" for target in self.targets)

    @property
    def contrastive(self) -> bool:
        """Whether a target has a softmax over samples."""
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
            scales = {(w.temperature, w.learnable) for w in likelihoods if isinstance(w, Boltzmann)}
            yield (
                len(scales) > 1,
                f"all {what} targets with a softmax share one likelihood.temperature (and whether "
                f"it is learnable), got {sorted(scales)}",
            )
        yield (
            self.balance is not None and len({target.supervised for target in self.targets}) < 2,
            "balance weighs self-supervised against supervised targets and only one kind is "
            "present; set objective.balance: null",
        )
