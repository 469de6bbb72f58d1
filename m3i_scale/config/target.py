"""One target group of an objective as configuration, and which combinations have a meaning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from m3i_scale.config.likelihoods import Boltzmann, Gaussian, Sigmoid
from m3i_scale.config.types import BelowOne, Node, Positive

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
    representation: Literal["pixels", "features", "gram", "global", "text", "category"]
    """What is predicted."""
    regularisation: Literal["none", "stop_gradient", "negatives", "decorrelation"] = "none"
    """What keeps learned targets from becoming all alike."""
    encoder: Annotated[str, Field(pattern=r"^[\w-]+$")] = "teacher"
    """Who encodes `features`, `gram` and `global` targets: `teacher`, the moving average of the
    student, `student` itself, or a name of `model.frozen_teachers`.
    """
    decoder: Literal["transformer", "linear", "projector"] = "transformer"
    """How dense targets are predicted: by mask tokens, or from each token by a linear layer or an
    MLP.
    """
    match: Literal["position", "similarity"] = "position"
    """How tokens are paired with patches of the other view."""
    likelihood: Annotated[Gaussian | Boltzmann | Sigmoid, Field(discriminator="form")]
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
    def pooled(self) -> bool:
        """Whether it is predicted from the pooled vector."""
        return self.representation in ("global", "text", "category")

    @property
    def supervised(self) -> bool:
        """Whether the group belongs to L_SP (text, category) rather than to L_SSP."""
        return self.representation in ("text", "category")

    @property
    def encoded(self) -> bool:
        """Whether an image encoder makes the target."""
        return self.representation in ("features", "gram", "global")

    @property
    def frozen(self) -> bool:
        """Whether a frozen teacher makes the target."""
        return self.encoded and self.encoder not in ("teacher", "student")

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
        if self.likelihood.form != "gaussian":
            return self.representation != "category"
        return self.regularisation == "decorrelation" and not self.correlates

    @property
    def both_directions(self) -> bool:
        """Whether predictions are gathered, too, to tell them apart by targets."""
        return isinstance(self.likelihood, Boltzmann) and self.likelihood.symmetric

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
            "negatives enter through a softmax or sigmoids; set likelihood.form: boltzmann or "
            "sigmoid",
        )
        yield (
            self.supervised and (gaussian or regularisation != "negatives"),
            f"a {what} target is told from the other {what} targets; set "
            "regularisation: negatives and likelihood.form: boltzmann",
        )
        yield (
            what == "category" and self.likelihood.form == "sigmoid",
            "an image has one category, which a softmax tells from the others; set "
            "likelihood.form: boltzmann",
        )
        yield (
            what == "pixels" and (regularisation != "none" or not gaussian),
            "pixels cannot collapse; set regularisation: none and likelihood.form: gaussian",
        )
        yield (
            what == "gram" and (not gaussian or regularisation not in ("none", "stop_gradient")),
            "similarities of tokens are matched, not told apart; set likelihood.form: gaussian and "
            "regularisation: stop_gradient",
        )
        yield (
            self.encoded and not self.frozen and regularisation == "none",
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
            self.representation == "gram"
            and (self.view != "same" or self.normalise != "none" or self.encoder == "student"),
            "cosines of the tokens of the view in the input are compared with a teacher's; leave "
            "view and normalise out, and set encoder: teacher or a frozen teacher",
        )
        yield (
            not self.encoded and self.encoder not in ("teacher", "student"),
            f"a {self.representation} target has no image encoder; leave encoder out, or set "
            "representation: features or global",
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
        yield (
            self.match == "similarity" and self.frozen,
            "similarity compares features of one network, and a frozen teacher has others; set "
            "match: position",
        )

    def _queues(self) -> Iterable[tuple[bool, str]]:
        likelihood = self.likelihood
        if not isinstance(likelihood, Boltzmann):
            return
        yield (
            likelihood.candidates == "own" and not likelihood.queue,
            "its own target is the only candidate, so that nothing is told apart; set "
            "likelihood.queue, or candidates: global",
        )
        yield (
            likelihood.queue > 0 and not (self.encoded and self.encoder != "student"),
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
