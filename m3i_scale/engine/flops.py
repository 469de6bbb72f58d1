"""Floating-point operations of training, counted by running the networks without data.

The networks of a configuration are built on PyTorch's meta device, which computes shapes alone, and
every matrix product and convolution of one forward pass is counted: no memory, a second or two even
for InternImage-H.

Convention: one multiply-add is 2 FLOPs; a backward pass is twice its forward pass. Element-wise
work, norms, softmax and optimiser are left out, and so is the product of predictions with the
targets of other ranks. Texts count at their full length. DCNv3 counts as its authors count it: 5
multiply-adds per position, sampling point and channel (four for the bilinear reading, one for the
weight).
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from m3i_kernels import active_backend, set_backend
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from m3i_scale.config import Config, Target
from m3i_scale.objective.inputs import Scene
from m3i_scale.objective.m3i import M3I

BACKWARD_PER_FORWARD = 2
_ROWS = 2  # one pair; everything counted here is proportional to the number of samples


class PartFlops(NamedTuple):
    """FLOPs per sample of one part of a training step."""

    forward: float
    backward: float  # 0 where nothing is trained
    recomputed: float  # forward passes repeated by activation checkpointing


@dataclass(frozen=True)
class Flops:
    """FLOPs per sample of one optimiser step, by part.

    Parts: "backbone" (the online encoder on the input), "momentum encoder" (on all clean views),
    "online targets" (online encoder on clean views), "decoder" (once per dense target), "text
    tower", "heads" (pooling, projections, classifier). Only those that the objective has.
    """

    parts: dict[str, PartFlops]

    @property
    def forward(self) -> float:
        """One forward pass of everything."""
        return sum(part.forward for part in self.parts.values())

    @property
    def model(self) -> float:
        """What the method needs, without recomputation; what model FLOPs utilisation counts."""
        return self.forward + sum(part.backward for part in self.parts.values())

    @property
    def hardware(self) -> float:
        """What is computed, with the recomputation of activation checkpointing."""
        return self.model + sum(part.recomputed for part in self.parts.values())


def step_flops(config: Config) -> Flops:
    """Count the FLOPs that one sample costs in one optimiser step.

    May be called anywhere, also beside a running training: it uses no process group, and neither
    memory nor random generators of a device.

    Raises:
        ValueError: the networks cannot be built.
    """
    # Drawing initial weights advances the default generator even where there are none.
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad(), _reference():
        model = M3I(config.model, config.objective, config.data.image_size)
        return Flops(_count_parts(model, _empty_scene(config), _checkpointed(model, config)))


def count_flops(function: Callable[[], Any], inside: Iterable[nn.Module] = ()) -> tuple[int, int]:
    """FLOPs of `function()` (forward only), and those of them spent in the modules `inside`.

    Counted are matrix products, attention, convolutions and DCNv3 in plain torch; on any device.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_DCNV3)
    marks: list[int] = []
    hooks = [
        hook
        for module in inside
        for hook in (
            module.register_forward_pre_hook(lambda *_: marks.append(-counter.get_total_flops())),
            module.register_forward_hook(lambda *_: marks.append(counter.get_total_flops())),
        )
    ]
    with counter:
        function()
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops(), sum(marks)


def _sampling_flops(*_: Any, out_shape: torch.Size, **__: Any) -> int:
    """Of `grid_sample` as DCNv3 uses it: the output has one element per channel and point."""
    return 2 * 5 * out_shape.numel()


_DCNV3 = {torch.ops.aten.grid_sampler_2d: _sampling_flops}


@contextlib.contextmanager
def _reference() -> Iterator[None]:
    """Plain torch operators meanwhile: Triton's want a device."""
    before = active_backend()
    set_backend("reference")
    try:
        yield
    finally:
        set_backend(before)


def _count_parts(model: M3I, scene: Scene, blocks: list[nn.Module]) -> dict[str, PartFlops]:
    online, targets = model.online, model.objective.targets
    views = collections.Counter(encoder for encoder, _ in model.encodings)

    def trained(function: Callable[[], Any], times: int = 1) -> PartFlops:
        forward, inside = (times * count / _ROWS for count in count_flops(function, blocks))
        return PartFlops(forward, BACKWARD_PER_FORWARD * forward, inside)

    def predict(dense: bool) -> None:
        for target in targets:
            if target.dense == dense:
                _predict(model, target, scene)

    backbone = trained(lambda: online.backbone.features(scene.image))
    head = trained(lambda: _project(model))
    encoding = PartFlops(*(a + b for a, b in zip(backbone, head, strict=True)))  # of a clean view
    parts = {
        "backbone": backbone,
        "momentum encoder": PartFlops(views["momentum"] * encoding.forward, 0.0, 0.0),
        "online targets": PartFlops(*(views["online"] * value for value in encoding)),
        "decoder": trained(lambda: predict(dense=True)),
        "text tower": trained(lambda: _read(model, scene)),
        "heads": trained(lambda: predict(dense=False)),
    }
    return {name: part for name, part in parts.items() if part.forward}


def _features(model: M3I) -> Tensor:
    return torch.empty(_ROWS, model.grid[0] * model.grid[1], model.online.backbone.width)


def _project(model: M3I) -> None:
    """What an encoder adds to the features of a clean view where a target is global."""
    if model.online.projector is not None:
        model.online.projector(model.online.backbone.pool(_features(model)))


def _read(model: M3I, scene: Scene) -> None:
    """`TextTower.forward` on texts without padding; with a mask BERT would look at its values."""
    if hasattr(model, "text_tower"):
        tower = model.text_tower
        tower.projection(tower.bert(input_ids=scene.tokens).last_hidden_state[:, 0])


def _predict(model: M3I, target: Target, scene: Scene) -> None:
    """What one target group computes from the features of the input."""
    features, role = _features(model), model.roles(scene)[target.image]
    if target.dense:
        model.predict_dense(target, features, role, scene)
    elif target.representation == "text":
        model.predict_text(features, role)
    elif target.representation == "category":
        model.category_head(model.online.backbone.pool(features, role.seen))
    else:
        model.predict_global(features, role)


def _checkpointed(model: M3I, config: Config) -> list[nn.Module]:
    """Trained blocks whose forward pass runs again in the backward pass."""
    owners = [
        module
        for name, module in model.named_modules()
        if getattr(module, "checkpoint_blocks", False) and not name.startswith("momentum.")
    ]
    blocks = [block for owner in owners if hasattr(owner, "blocks") for block in owner.blocks]
    if config.model.text is not None and config.model.text.checkpoint_blocks:
        blocks += model.text_tower.bert.encoder.layer
    return blocks


def _empty_scene(config: Config) -> Scene:
    size, patch = config.data.image_size, config.objective.input.patch
    length = config.model.text.max_length if config.model.text else 0
    image, box = torch.empty(_ROWS, 3, size, size), torch.empty(_ROWS, 4)
    flag, number = torch.empty(_ROWS, dtype=torch.bool), torch.empty(_ROWS, dtype=torch.int64)
    return Scene(
        image=image,
        clean_a=image,
        clean_b=image,
        seen=torch.empty(_ROWS, size // patch, size // patch, dtype=torch.bool),
        partner=number,
        box_a=box,
        box_b=box,
        flip_a=flag,
        flip_b=flag,
        tokens=torch.empty(_ROWS, length, dtype=torch.int64),
        token_mask=torch.empty(_ROWS, length, dtype=torch.bool),
        has_text=flag,
        category=number,
    )
