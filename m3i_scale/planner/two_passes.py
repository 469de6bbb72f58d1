"""What the second forward pass costs, where samples are compared across a step's micro-batches.

`objective.negatives: batch` (m3i_scale/objective/step_loss.py): every micro-batch runs without
gradient first; embeddings, their derivatives and the teacher's encodings of all of a rank's
micro-batches wait for the second pass, and the micro-batches themselves in the host's memory.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple, TypeGuard

from m3i_scale.config import Boltzmann, Config, Model, RunConfig, Target
from m3i_scale.engine.schedules import BatchSplit
from m3i_scale.models.precision import DTYPES
from m3i_scale.planner.zero3_replay import Use
from m3i_scale.profiling.flops import Flops
from m3i_scale.profiling.record import Trace

FLOAT = 4  # bytes: embeddings are compared in float32


class Waiting(NamedTuple):
    """Bytes per GPU."""

    embeddings: float  # with derivatives, from the first pass to the end of the second
    encodings: float  # the teacher's, as long
    comparing: float  # most at once while the loss is computed, between the passes


def runs_twice(config: RunConfig, batch: BatchSplit) -> TypeGuard[Config]:
    """Whether a configuration's micro-batches do."""
    return isinstance(config, Config) and config.objective.runs_twice(batch.accumulation)


def held(config: RunConfig, batch: BatchSplit) -> float:
    """Bytes per GPU, page-locked in the host's memory: a step's views, texts and masks."""
    if not runs_twice(config, batch):
        return 0
    data, text = config.data, config.model.text
    views = data.augmentation.views * 3 * data.image_size**2
    tokens = 9 * text.max_length if text else 0  # int64, and whether they are there
    mask = (data.image_size // config.objective.input.patch) ** 2
    return batch.micro * batch.accumulation * (views + tokens + mask)


def target_width(model: Model, traced: Trace, target: Target) -> int:
    """D of a group's embeddings."""
    if target.representation == "text":
        assert model.text is not None
        return model.text.embed_dim
    if target.frozen:
        encoder = traced.frozen[target.encoder]
        return encoder.width if target.dense else encoder.pooled_width or 0
    projected = target.representation == "global" or target.decoder == "projector"
    return model.global_head.width if projected else traced.width


def repeated_parts(config: Config) -> set[str]:
    """Parts of `Flops` that run once more; the teacher runs in the first pass instead."""
    compared = [target for target in config.objective.targets if target.compares]
    decoded = any(t.dense and t.decoder == "transformer" for t in compared)
    text = any(t.representation == "text" for t in compared)
    parts = {"backbone", "heads"} if compared else set()
    return parts | ({"decoder"} if decoded else set()) | ({"text tower"} if text else set())


def with_first_pass(flops: Flops, config: Config) -> Flops:
    """FLOPs with those of the first pass among the recomputed ones."""
    again = repeated_parts(config)
    return Flops(
        {
            name: part._replace(recomputed=part.recomputed + part.forward * (name in again))
            for name, part in flops.parts.items()
        }
    )


def first_pass_uses(config: Config, steps: list[Use]) -> list[Use]:
    """Of a micro-step's uses of modules those of its first pass, without the teacher's."""
    return [u for u in steps if u.phase != "backward" and _again(config, u.module)]


def first_pass_visits(config: Config, traced: Trace) -> int:
    """Modules that a first pass enters, without the teacher's."""
    return sum(call.enter and _again(config, call.module) for call in traced.calls)


def _again(config: Config, module: str) -> bool:
    """Whether a module runs in the first pass, and in the second as well."""
    again, first = repeated_parts(config), module.partition(".")[0]
    parts = {"decoders": "decoder", "text_tower": "text tower"}
    never = first in ("teacher", "category_head", "linear_decoders")
    return bool(again) and not never and parts.get(first, "backbone") in again


def waiting(config: RunConfig, traced: Trace, ranks: int, batch: BatchSplit) -> Waiting:
    """What waits between the passes."""
    if not runs_twice(config, batch):
        return Waiting(0, 0, 0)
    samples = batch.micro * batch.accumulation
    embeddings = comparing = 0.0
    views: dict[str, set[str]] = defaultdict(set)  # that an encoder sees in the first pass
    inputs = 2 if config.objective.input.both_views else 1
    for target in config.objective.targets:
        rows, width = (
            traced.tokens if target.dense else 1,
            target_width(config.model, traced, target),
        )
        if target.across and target.encoded and target.encoder != "student":
            views[target.encoder] |= {target.view} if inputs == 1 else {"same", "other"}
        likelihood = target.likelihood
        if not target.compares:
            continue
        sides = 2 if target.both_directions else 1
        # Predictions and targets, their derivatives, and the graph's copies of both.
        embeddings += inputs * 4 * samples * rows * width * FLOAT
        candidates = ranks * samples * rows
        if isinstance(likelihood, Boltzmann) and likelihood.candidates == "own":
            candidates = likelihood.queue
        # Candidates as gathered, as compared and their derivatives; scores and theirs.
        scores = batch.micro * rows * candidates
        comparing = max(comparing, (3 * sides * candidates * width + 4 * sides * scores) * FLOAT)
    widths = {name: encoder.width for name, encoder in traced.frozen.items()}
    features = sum(len(seen) * widths.get(name, traced.width) for name, seen in views.items())
    encodings = samples * traced.tokens * features * DTYPES[config.engine.precision].itemsize
    return Waiting(embeddings, encodings, comparing)
