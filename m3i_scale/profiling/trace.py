"""The trace of one forward pass of a configuration's networks, from which `m3i plan` computes.

The networks run on fake tensors, which have shapes and no contents. The trace records the
parameters, the order of module calls, the FLOPs of each part, and the bytes that autograd keeps for
the backward pass. It takes a second or two per hundred modules, on any machine, without a process
group.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from m3i_kernels import active_backend, set_backend
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from m3i_scale.config import Backbone, Input, Model, Objective
from m3i_scale.models.frozen import FrozenEncoder
from m3i_scale.models.layers import residual_blocks
from m3i_scale.models.precision import DTYPES
from m3i_scale.objective.collectives import alone
from m3i_scale.objective.inputs import MixedBatch
from m3i_scale.objective.m3i import M3I

BACKWARD = 2  # FLOPs of a backward pass, in forward passes
FROZEN = "frozen teachers"  # the part of a step
ROWS = 2  # one pair; everything recorded here is proportional to the number of samples


class Weight(NamedTuple):
    """One parameter, and the module that owns it."""

    name: str
    module: str
    elements: int
    trained: bool

    @property
    def of_teacher(self) -> bool:
        """Whether it is the teacher's."""
        return is_teachers(self.name)


class Frozen(NamedTuple):
    """A frozen teacher: whole on every rank, outside of ZeRO."""

    elements: int
    width: int  # of its tokens
    pooled_width: int | None


class Call(NamedTuple):
    """A module is entered or left; `grad` where autograd records."""

    module: str
    enter: bool
    grad: bool


def is_teachers(name: str) -> bool:
    """Whether a parameter or module of that name is the teacher's."""
    return name.startswith("teacher.")


@dataclass
class Block:
    """One call of a block that may be checkpointed, in bytes per sample."""

    input: float  # what checkpointing keeps
    inside: float  # what autograd keeps without it
    calls: range  # of the block, in `Trace.calls`
    recomputed: bool  # whether the configuration checkpoints it


@dataclass
class Trace:
    """What one forward pass has shown."""

    weights: list[Weight] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    leaves: set[str] = field(default_factory=set)  # modules that ZeRO gathers as one
    outside: float = 0.0  # bytes per sample that autograd keeps outside of blocks
    frozen: dict[str, Frozen] = field(default_factory=dict)
    width: int = 0  # of the features
    tokens: int = 0  # of one image
    forward: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    backward: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    recomputed: dict[str, float] = field(default_factory=lambda: defaultdict(float))


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
    with torch.random.fork_rng(devices=[]), _operators(kernels), alone():
        with torch.device("meta"):
            networks = M3I(_unchecked(model), objective, image_size, frozen).to(dtype)
        for encoder in networks.frozen.values():
            encoder.to(dtype)
        with FakeTensorMode(allow_non_fake_inputs=True):
            for encoder in networks.frozen.values():
                encoder.to_empty(device="cpu")
            record = _Record(networks.to_empty(device="cpu"), _recomputed(model))
            batch = _mixed_batch(objective.input, image_size, length, dtype)
            record.run(lambda: networks.forward(batch))
    return record.trace


class _Record:
    """Hooks on all modules of a model, and their records."""

    def __init__(self, model: M3I, recomputed: tuple[str, ...]) -> None:
        rows, columns = model.grid
        self.trace = Trace(width=model.student.backbone.width, tokens=rows * columns)
        self._model = model
        self._counter = FlopCounter()
        self._kept: dict[int, Tensor] = {}
        self._bytes = 0
        self._parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        self._part: str | None = None  # the outermost module of a part that is running
        for name, module in model.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                self.trace.weights.append(
                    Weight(f"{name}.{own}", name, parameter.numel(), parameter.requires_grad)
                )
            self._watch(name, module)
        for name, encoder in model.frozen.items():
            elements = sum(p.numel() for p in encoder.parameters())
            self.trace.frozen[name] = Frozen(elements, encoder.width, encoder.pooled_width)
            self._watch_frozen(encoder)
        whole = {id(block) for block in model.blocks_run_once()}
        self.trace.leaves = {name for name, m in model.named_modules() if id(m) in whole}
        for name, module in residual_blocks(model):
            self._watch_block(name, module, recomputed=name.startswith(recomputed))

    def run(self, forward: Callable[[], Any]) -> None:
        """Record one forward pass."""
        keep = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        with self._counter, keep:
            forward()
        inside = sum(block.inside for block in self.trace.blocks)
        self.trace.outside = self._bytes / ROWS - inside

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._kept and storage._cdata not in self._parameters:
            self._kept[storage._cdata] = tensor  # alive, so that the address is not used again
            self._bytes += storage.nbytes()
        return tensor

    def _watch(self, name: str, module: nn.Module) -> None:
        part = _part_of(
            name, pooling=any(m is module for m in self._model.student.backbone.pooling.modules())
        )
        start = 0

        def enter(*_: Any) -> None:
            nonlocal start
            self.trace.calls.append(Call(name, True, torch.is_grad_enabled()))
            if self._part is None:
                self._part, start = name, self._counter.total

        def leave(*_: Any) -> None:
            self.trace.calls.append(Call(name, False, torch.is_grad_enabled()))
            if self._part == name:
                self._part = None
                flops = (self._counter.total - start) / ROWS
                self.trace.forward[part] += flops
                self.trace.backward[part] += BACKWARD * flops * torch.is_grad_enabled()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def _watch_frozen(self, encoder: FrozenEncoder) -> None:
        """Its FLOPs; ZeRO knows none of its modules, and autograd keeps nothing of it."""
        start = 0

        def enter(*_: Any) -> None:
            nonlocal start
            start = self._counter.total

        def leave(*_: Any) -> None:
            self.trace.forward[FROZEN] += (self._counter.total - start) / ROWS

        encoder.register_forward_pre_hook(enter)
        encoder.register_forward_hook(leave)

    def _watch_block(self, name: str, module: nn.Module, *, recomputed: bool) -> None:
        part = _part_of(name)
        marks: list[tuple[int, int, int]] = []

        def enter(*_: Any) -> None:
            calls = len(self.trace.calls) - 1  # the block's own call is there already
            marks.append((self._bytes, calls, self._counter.total))

        def leave(_: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
            size, call, flops = marks.pop()
            if not torch.is_grad_enabled():
                return
            x = inputs[0]
            block = Block(
                input=x.numel() * x.element_size() / ROWS,
                inside=(self._bytes - size) / ROWS,
                calls=range(call, len(self.trace.calls)),
                recomputed=recomputed,
            )
            self.trace.blocks.append(block)
            if recomputed:
                self.trace.recomputed[part] += (self._counter.total - flops) / ROWS

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)


def _part_of(name: str, *, pooling: bool = False) -> str:
    """The part of a training step that a module belongs to."""
    first, second = [*name.split("."), ""][:2]
    if first == "teacher":
        return "teacher"
    if (first, second) == ("student", "backbone") and not pooling:
        return "backbone"
    return {"text_tower": "text tower", "decoders": "decoder"}.get(first, "heads")


def _sampling_flops(*_: Any, out_shape: torch.Size, **__: Any) -> int:
    """Of `grid_sample` as DCNv3 uses it: the output has one element per channel and point."""
    return 2 * 5 * out_shape.numel()


def _dcnv3_flops(*inputs: Any, out_shape: torch.Size, **_: Any) -> int:
    """Of the DCNv3 kernel; arguments as `m3i_kernels.dcnv3.op.dcnv3_op`, tensors as shapes."""
    mask, groups = inputs[2], inputs[8]
    return 2 * 5 * out_shape.numel() * (mask[-1] // groups)


def _depthwise_flops(*inputs: Any, out_shape: torch.Size, **_: Any) -> int:
    """Of the depthwise kernel; weight is (C, 1, K, K)."""
    return 2 * out_shape.numel() * inputs[1][-1] ** 2


def _formulas() -> dict[Any, Callable[..., int]]:
    formulas = {torch.ops.aten.grid_sampler_2d: _sampling_flops}
    if hasattr(torch.ops.m3i_kernels, "dcnv3"):  # the module of the kernel has been imported
        formulas[torch.ops.m3i_kernels.dcnv3] = _dcnv3_flops
    if hasattr(torch.ops.m3i_kernels, "depthwise_conv"):
        formulas[torch.ops.m3i_kernels.depthwise_conv] = _depthwise_flops
    return formulas


class _FusedAttention(torch.autograd.Function):
    """Shapes of attention, and what every fused kernel keeps for its backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        # In memory (B, T, heads, D), so that the heads are joined without a copy.
        *batch, heads, wanted, _ = q.shape
        out = q.new_empty(*batch, wanted, heads, v.shape[-1]).transpose(-3, -2)
        log_sum_exp = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, mask, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError("a trace has no backward pass")


class FlopCounter(TorchFunctionMode):
    """Counts the FLOPs of matrix products, attention, convolutions and DCNv3 in its context.

    PyTorch counts by kernel, and which kernel attention gets depends on device, dtype, mask and
    release; not every one of them has a formula. So attention never reaches a kernel here: it is
    counted by its shapes, and its result has a shape and no values. Fake and meta tensors only.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kernels = FlopCounterMode(display=False, custom_mapping=_formulas())
        self._attention = 0

    @property
    def total(self) -> int:
        """FLOPs so far."""
        return self._kernels.get_total_flops() + self._attention

    def __enter__(self) -> FlopCounter:
        self._kernels.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        self._kernels.__exit__(*reason)

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            return self._attend(*arguments, **(named or {}))
        return function(*arguments, **(named or {}))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        rows = query.numel() // query.shape[-1]  # B * heads * T
        self._attention += 2 * rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        return _FusedAttention.apply(query, key, value, attn_mask)


def count_flops(function: Callable[[], Any]) -> int:
    """FLOPs of `function()` on fake or meta tensors; forward only."""
    with FlopCounter() as counter:
        function()
    return counter.total


@contextlib.contextmanager
def _operators(kernels: bool) -> Iterator[None]:
    """The Triton operators, of which fake tensors see only shapes, or the plain torch ones."""
    if kernels:
        import m3i_kernels.dcnv3.op
        import m3i_kernels.depthwise.op  # noqa: F401  before their formulas are looked up
    before = active_backend()
    set_backend("triton" if kernels else "reference")
    try:
        yield
    finally:
        set_backend(before)


def reference_operators() -> contextlib.AbstractContextManager[None]:
    """The plain torch operators, which count and run anywhere."""
    return _operators(kernels=False)


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
