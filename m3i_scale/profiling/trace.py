"""The trace of one forward pass of a configuration's networks, from which `m3i plan` computes.

The networks run on fake tensors, which have shapes and no contents. The trace records the
parameters, the order of module calls, the FLOPs of each part, and the bytes that autograd keeps for
the backward pass. It takes a second or two per hundred modules, on any machine, without a process
group.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from m3i_scale.config import Backbone, Input, Model, Objective
from m3i_scale.models.frozen import FrozenEncoder
from m3i_scale.models.layers import residual_blocks
from m3i_scale.models.precision import DTYPES
from m3i_scale.objective.collectives import alone
from m3i_scale.objective.inputs import MixedBatch
from m3i_scale.objective.m3i import M3I
from m3i_scale.profiling.counter import operators
from m3i_scale.profiling.record import ROWS, Record, Trace


def trace(
    model: Model,
    objective: Objective,
    image_size: int,
    frozen: Mapping[str, FrozenEncoder] | None = None,
    *,
    precision: str,
    kernels: bool,
) -> Trace:
    """Run the networks once on fake tensors.

    Args:
        model: the networks; checkpointing is off during the pass, `Block.recomputed` tells it.
        objective: what they are trained for.
        image_size: side of the views in pixels.
        frozen: the frozen teachers, on the meta device.
        precision: of computation, as `config.Engine.precision`.
        kernels: count the memory of the Triton kernels, not of the plain torch operators.

    Raises:
        ValueError: the networks cannot be built, or `kernels` is asked for without Triton.
    """
    dtype = DTYPES[precision]
    length = model.text.max_length if model.text else 0
    # Drawing initial weights advances the default generator even where there are none.
    # No collectives: this may run beside a training, on one rank only.
    with torch.random.fork_rng(devices=[]), operators(kernels), alone():
        with torch.device("meta"):
            networks = M3I(_unchecked(model), objective, image_size, frozen).to(dtype)
        for encoder in networks.frozen.values():
            encoder.to(dtype)
        with FakeTensorMode(allow_non_fake_inputs=True):
            for encoder in networks.frozen.values():
                encoder.to_empty(device="cpu")
            pooling = {id(m) for m in networks.student.backbone.pooling.modules()}
            record = Record(
                networks.to_empty(device="cpu"),
                part=lambda name, module: _part_of(name, pooling=id(module) in pooling),
                blocks=residual_blocks(networks),
                recomputed=_recomputed(model),
                leaves=networks.blocks_run_once(),
            )
            for name, encoder in networks.frozen.items():
                record.watch_frozen(name, encoder)
            batch = _mixed_batch(objective.input, image_size, length, dtype)
            record.run(lambda: networks.forward(batch))
    rows, columns = networks.grid
    found = record.trace
    found.width, found.tokens = networks.student.backbone.width, rows * columns
    found.title = f"{model.backbone.name}, {image_size} pixels"
    return found


def _part_of(name: str, *, pooling: bool = False) -> str:
    """The part of a training step that a module belongs to."""
    first, second = [*name.split("."), ""][:2]
    if first == "teacher":
        return "teacher"
    if (first, second) == ("student", "backbone") and not pooling:
        return "backbone"
    return {"text_tower": "text tower", "decoders": "decoder"}.get(first, "heads")


def without_checkpointing(backbone: Backbone) -> Backbone:
    """The same backbone, which recomputes nothing."""
    options = {key: value for key, value in backbone.options.items() if key != "checkpoint_blocks"}
    return backbone.model_copy(update={"options": options})


def _unchecked(model: Model) -> Model:
    """The same networks without activation checkpointing."""
    text = model.text and model.text.model_copy(update={"checkpoint_blocks": False})
    backbone = without_checkpointing(model.backbone)
    decoder = model.decoder.model_copy(update={"checkpoint_blocks": False})
    return model.model_copy(update={"backbone": backbone, "decoder": decoder, "text": text})


def _recomputed(model: Model) -> tuple[str, ...]:
    """Beginnings of the names of checkpointed blocks."""
    text = model.text is not None and model.text.checkpoint_blocks
    return (
        *(["student."] if model.backbone.options.get("checkpoint_blocks") else []),
        *(["decoders."] if model.decoder.checkpoint_blocks else []),
        *(["text_tower."] if text else []),
    )


def _mixed_batch(spec: Input, size: int, length: int, dtype: torch.dtype) -> MixedBatch:
    side = size // spec.patch
    image = torch.empty(ROWS, 3, size, size, dtype=dtype)
    box, flag = torch.empty(ROWS, 4), torch.empty(ROWS, dtype=torch.bool)
    number = torch.empty(ROWS, dtype=torch.int64)
    return MixedBatch(
        image=torch.cat([image, image]) if spec.both_views else image,
        clean_a=image,
        clean_b=image,
        seen=torch.empty(ROWS, side, side, dtype=torch.bool),
        partner=number,
        box_a=box,
        box_b=box,
        flip_a=flag,
        flip_b=flag,
        tokens=torch.empty(ROWS, length, dtype=torch.int64),
        token_mask=torch.empty(ROWS, length, dtype=torch.bool),
        has_text=flag,
        category=number,
        key=number,
    )
