"""What one forward pass on fake tensors shows: parameters, calls of modules, FLOPs, kept bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from m3i_scale.models.frozen import FrozenEncoder
from m3i_scale.models.precision import DTYPES
from m3i_scale.objective.collectives import alone
from m3i_scale.profiling.counter import FlopCounter, operators

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
    running: float = 0.0  # bytes per sample of images and a block of a backbone that is frozen
    frozen: dict[str, Frozen] = field(default_factory=dict)
    width: int = 0  # of the features
    tokens: int = 0  # of one image
    forward: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    backward: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    recomputed: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    # Traces at smaller sizes of the images, with their shares of the steps.
    smaller: list[tuple[float, Trace]] = field(default_factory=list)
    title: str = ""  # the networks and their input in a few words
    checkpointing: str = "checkpoint_blocks: true"  # what makes all blocks be recomputed
    notes: tuple[str, ...] = ()  # what the pass stands for


@dataclass(frozen=True)
class Sketch:
    """A task's networks, and one pass of them that needs no data.

    Attributes:
        title: the networks and their input in a few words.
        build: the networks, checkpointing off; called on the meta device.
        run: the forward pass of `ROWS` samples with its loss, on fake tensors and without
            looking at contents.
        part: the part of a step that a module belongs to, by its name.
        blocks: names and modules that may be checkpointed.
        recomputed: beginnings of the names of those that are.
        leaves: modules that ZeRO-3 gathers as one.
        checkpointing: settings with which all blocks are recomputed.
        notes: what the pass stands for, and what is left out.
    """

    title: str
    build: Callable[[], nn.Module]
    run: Callable[[Any], object]
    part: Callable[[str], str]
    blocks: Callable[[Any], Iterable[tuple[str, nn.Module]]]
    recomputed: tuple[str, ...]
    leaves: Callable[[Any], Iterable[nn.Module]]
    checkpointing: str
    notes: tuple[str, ...] = ()


def trace_sketch(sketch: Sketch, *, precision: str, kernels: bool) -> Trace:
    """Run a sketch once.

    Args:
        sketch: networks and pass.
        precision: of computation, as `config.Engine.precision`.
        kernels: count the memory of the Triton kernels, not of the plain torch operators.

    Raises:
        ValueError: the networks cannot be built, or `kernels` is asked for without Triton.
    """
    with torch.random.fork_rng(devices=[]), operators(kernels), alone():
        with torch.device("meta"):
            networks = sketch.build().to(DTYPES[precision])
        with FakeTensorMode(allow_non_fake_inputs=True):
            record = Record(
                networks.to_empty(device="cpu").train(),
                part=lambda name, _: sketch.part(name),
                blocks=sketch.blocks(networks),
                recomputed=sketch.recomputed,
                leaves=sketch.leaves(networks),
            )
            record.run(lambda: sketch.run(networks))
    found = record.trace
    found.title, found.notes = sketch.title, sketch.notes
    found.checkpointing = sketch.checkpointing
    if not found.blocks and not all(weight.trained for weight in found.weights):
        # Nothing is kept of a frozen backbone, and it runs all the same.
        trained = replace(sketch, build=lambda: sketch.build().requires_grad_(True))
        kept = trace_sketch(trained, precision=precision, kernels=kernels)
        found.running = kept.outside + max((block.inside for block in kept.blocks), default=0)
    return found


class Record:
    """Hooks on all modules of a model, and their records.

    Args:
        model: the networks, on fake tensors.
        part: the part of a step that a module belongs to, by its name and itself.
        blocks: names and modules that may be checkpointed; their first input is a tensor.
        recomputed: beginnings of the names of those that are.
        leaves: modules that ZeRO-3 gathers as one.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        part: Callable[[str, nn.Module], str],
        blocks: Iterable[tuple[str, nn.Module]],
        recomputed: tuple[str, ...],
        leaves: Iterable[nn.Module],
    ) -> None:
        self.trace = Trace()
        self._counter = FlopCounter()
        self._kept: dict[int, Tensor] = {}
        self._given: dict[int, Tensor] = {}  # to blocks by name
        self._bytes = 0
        self._parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        self._part: str | None = None  # the outermost module of a part that is running
        self.trace.weights = [
            Weight(name, name.rpartition(".")[0], parameter.numel(), parameter.requires_grad)
            for name, parameter in model.named_parameters()  # a shared one once
        ]
        whole = {id(leaf) for leaf in leaves}
        for name, module in model.named_modules():
            if id(module) in whole:
                self.trace.leaves.add(name)
            self._watch(name, module, part(name, module))
        for name, block in blocks:
            self._watch_block(name, block, part(name, block), name.startswith(recomputed))

    def run(self, forward: Callable[[], object]) -> None:
        """Record one forward pass."""
        keep = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        with self._counter, keep:
            forward()
        inside = sum(block.inside for block in self.trace.blocks)
        self.trace.outside = self._bytes / ROWS - inside

    def watch_frozen(self, name: str, encoder: FrozenEncoder) -> None:
        """A frozen teacher's FLOPs; ZeRO knows none of its modules, and autograd keeps nothing."""
        elements = sum(p.numel() for p in encoder.parameters())
        self.trace.frozen[name] = Frozen(elements, encoder.width, encoder.pooled_width)
        start = 0

        def enter(*_: Any) -> None:
            nonlocal start
            start = self._counter.total

        def leave(*_: Any) -> None:
            self.trace.forward[FROZEN] += (self._counter.total - start) / ROWS

        encoder.register_forward_pre_hook(enter)
        encoder.register_forward_hook(leave)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._kept and storage._cdata not in self._parameters:
            self._kept[storage._cdata] = tensor  # alive, so that the address is not used again
            self._bytes += storage.nbytes()
        return tensor

    def _watch(self, name: str, module: nn.Module, part: str) -> None:
        trained = any(p.requires_grad for p in module.parameters())
        running: list[bool] = []  # whether autograd records, of each call under way
        start = 0

        def enter(_: nn.Module, inputs: Any, named: Any) -> None:
            nonlocal start
            wanted = trained or any(x.requires_grad for x in _tensors((inputs, named)))
            running.append(torch.is_grad_enabled() and wanted)
            self.trace.calls.append(Call(name, True, running[-1]))
            if self._part is None:
                self._part, start = name, self._counter.total

        def leave(*_: Any) -> None:
            grad = running.pop()
            self.trace.calls.append(Call(name, False, grad))
            if self._part == name:
                self._part = None
                flops = (self._counter.total - start) / ROWS
                self.trace.forward[part] += flops
                self.trace.backward[part] += BACKWARD * flops * grad

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave)

    def _watch_block(self, name: str, module: nn.Module, part: str, recomputed: bool) -> None:
        marks: list[tuple[int, int, int, int]] = []

        def enter(_: nn.Module, __: Any, named: Any) -> None:
            calls = len(self.trace.calls) - 1  # the block's own call is there already
            marks.append((self._bytes, calls, self._counter.total, self._new(named)))

        def leave(_: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
            size, call, flops, given = marks.pop()
            if not self.trace.calls[-1].grad:
                return
            x = inputs[0]
            block = Block(
                input=(x.numel() * x.element_size() + given) / ROWS,
                inside=(self._bytes - size) / ROWS,
                calls=range(call, len(self.trace.calls)),
                recomputed=recomputed,
            )
            self.trace.blocks.append(block)
            if recomputed:
                self.trace.recomputed[part] += (self._counter.total - flops) / ROWS

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave)

    def _new(self, named: Any) -> int:
        """Bytes that a checkpointed block keeps of its named inputs, and nothing else does."""
        total = 0
        for tensor in _tensors(named):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._kept and key not in self._given and key not in self._parameters:
                self._given[key] = tensor
                total += storage.nbytes()
        return total


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
