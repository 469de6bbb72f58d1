"""The state of a run as tensors and JSON, and back: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m3i_scale.cluster.launch import World, seed_rank
from m3i_scale.engine import shards
from m3i_scale.engine.checkpoint import CheckpointError, CheckpointReader, extent
from m3i_scale.engine.checksums import MODULUS, additive_sums
from m3i_scale.engine.saver import any_rank
from m3i_scale.engine.task import InitialWeights, Task
from m3i_scale.engine.zero import Sharded


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0  # optimiser steps behind us
    position: int = 0  # stream position of the next step's first sample
    skipped: int = 0  # steps without an update because a gradient was not finite


def snapshot(
    sharded: Sharded,
    world: World,
    progress: Progress,
    task: Task,
    *,
    stated: Mapping[str, Any] | None = None,
    copy: bool = True,
    sums: dict[str, int] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """This rank's tensors in CPU memory, and the state that all ranks share (a collective).

    The tensors are private copies, or with `copy` False, on a CPU, the living ones: for a write
    that ends before the next step, where memory does not hold a second copy of everything.
    `stated` are further entries of the state, what the run says about itself (`agreement`).
    `sums` takes up the checksums of the tensors where they live.
    """
    living: dict[str, Tensor] = {}
    for kind, parts in _kinds(sharded).items():
        slices = sharded.shards.even([(parameter, view) for _, parameter, view in parts])
        for (name, _, _), part in zip(parts, slices, strict=True):
            living[f"{kind}/{name}"] = part.detach()
    for name, buffer in buffers(sharded.model):  # all ranks have them, each writes its slice
        own = extent(buffer.numel(), world.rank, world.size)
        part = buffer.flatten()[own.start : own.stop]
        living[f"buffer/{name}"] = part.detach()
    if sums is not None:
        sums |= additive_sums(living)
    tensors = {name: part.to("cpu", copy=copy) for name, part in living.items()}
    tensors |= {f"rng/{kind}": value for kind, value in generator_states(world).items()}
    state = {
        "step": progress.step,
        "position": progress.position,
        "skipped": progress.skipped,
        "ranks": world.size,
        "adam_step": sharded.shards.adam_step,
        **_moments(sharded.shards),
        **task.state_dict(),
        "shapes": parameter_shapes(sharded.model),
        "buffers": buffer_shapes(sharded.model),
        **(stated or {}),
    }
    return tensors, state


@torch.no_grad()
def restore(reader: CheckpointReader, sharded: Sharded, world: World, task: Task) -> Progress:
    """Load a checkpoint written by any number of ranks.

    Random generators continue exactly when the number of ranks is the same; otherwise they are
    seeded anew from the run's seed and the step.

    Raises:
        CheckpointError: it is of other networks, or of another optimiser.
    """
    model = sharded.model
    require_same_networks(reader, parameter_shapes(model) | buffer_shapes(model))
    _require_same_moments(reader, sharded.shards)
    for kind, parts in _kinds(sharded).items():
        for name, parameter, view in parts:
            view.copy_(reader.slice(kind, name, *sharded.shards.extent(parameter)))
    for name, buffer in buffers(model):
        buffer.copy_(reader.tensor("buffer", name))
    _require_as_written(reader, sharded, world)
    sharded.shards.adam_step = reader.state["adam_step"]
    sharded.shards.publish()
    if sharded.teacher is not None:
        sharded.teacher.publish()
    task.load_state_dict(reader.state)
    progress = Progress(*(reader.state[k] for k in ("step", "position", "skipped")))
    if reader.ranks == world.size:
        set_generator_states(reader.generator_states(world.rank), world)
    else:
        seed_rank(task.config.seed + 1 + progress.step, world.rank)
    return progress


def _require_as_written(reader: CheckpointReader, sharded: Sharded, world: World) -> None:
    """Compare the checksums of what was loaded with those of what was saved (a collective).

    Parts of a tensor add up to the same, however many ranks wrote it and read it.

    Raises:
        CheckpointError: something differs.
    """
    stored = reader.sums(world.rank, world.size)
    if any_rank(stored is None, world):
        return  # an older version wrote it
    assert stored is not None
    views = {
        f"{kind}/{name}": view for kind, parts in _kinds(sharded).items() for name, _, view in parts
    }
    own = additive_sums(views)
    if world.is_main:  # buffers are whole on all ranks
        own |= additive_sums({f"buffer/{n}": b for n, b in buffers(sharded.model)})
    names = sorted(f"buffer/{name}" for name, _ in buffers(sharded.model)) + sorted(views)
    away = torch.tensor([_signed(own.get(n, 0) - stored.get(n, 0)) for n in names])
    away = away.to(world.device)
    if world.size > 1:
        dist.all_reduce(away)
    differing = [name for name, value in zip(names, away.tolist(), strict=True) if value]
    if differing:
        raise CheckpointError(
            f"{reader.path} arrived in memory with other bits than were saved: "
            f"{', '.join(differing[:3])} ({len(differing)} tensors); its files match their "
            "checksums, so that a node's memory is at fault: check the nodes "
            "(python -m m3i_scale.cluster.node_check) and start again"
        )


def _signed(value: int) -> int:
    """A sum modulo 2 ** 64 as an int64."""
    return (value + (1 << 63)) % MODULUS - (1 << 63)


@torch.no_grad()
def start_from(initial: InitialWeights, sharded: Sharded, names: Mapping[str, str]) -> None:
    """Set parameters, and their averages, to given weights.

    `names` are those parameters, and what they are called in the weights.

    Frozen parameters, which nothing reads and no checkpoint has, stay as drawn.
    """
    for kind, parts in _kinds(sharded).items():
        for name, parameter, view in parts if kind in ("weight", "teacher") else ():
            if name in names:
                own = sharded.shards.extent(parameter)
                view.copy_(initial.part(kind, names[name], own.start, own.stop))
    sharded.shards.publish()
    if sharded.teacher is not None:
        sharded.teacher.publish()


def parameter_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Full shapes of all trained parameters, partitioned or not."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in shards.trained(model)}


def buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What training keeps besides parameters (queues of keys): whole and equal on all ranks."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def buffer_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Shapes of all buffers."""
    return {name: list(buffer.shape) for name, buffer in buffers(model)}


def _kinds(sharded: Sharded) -> dict[str, list[tuple[str, nn.Parameter, Tensor]]]:
    """Names, parameters and views of this rank's part, of everything that a checkpoint holds."""
    own, parameters = sharded.shards, list(shards.trained(sharded.model))
    kinds = {"weight": [(name, p, own.weight(p)) for name, p in parameters]}
    for moment in own.moments:
        kinds[moment] = [(name, p, own.moment(p, moment)) for name, p in parameters]
    averages = ((name, p, _average_of(sharded, name)) for name, p in parameters)
    averaged = [(name, p, view) for name, p, view in averages if view is not None]
    return kinds | ({"teacher": averaged} if averaged else {})


def _average_of(sharded: Sharded, name: str) -> Tensor | None:
    """The moving average of a parameter; a teacher and its student share names."""
    average = sharded.teacher
    if average is None or not name.startswith(average.prefix):
        return None
    return average.averages[name.removeprefix(average.prefix)]


def require_same_networks(reader: CheckpointReader, shapes: dict[str, list[int]]) -> None:
    """Raise CheckpointError, with a name, where a checkpoint has other tensors than `shapes`."""
    stored = reader.shapes | reader.buffers
    if stored == shapes:
        return
    differing = sorted(
        name for name in stored.keys() | shapes.keys() if stored.get(name) != shapes.get(name)
    )
    name = differing[0]
    raise CheckpointError(
        f"{reader.path} is of other networks: {len(differing)} parameters differ, for instance "
        f"{name} is {stored.get(name, 'absent')} there and {shapes.get(name, 'absent')} "
        "here; use the configuration it was trained with, or another run name"
    )


def _moments(own: shards.Shards) -> dict[str, list[str]]:
    """What the optimiser averages, where it is not AdamW."""
    return {} if own.moments == shards.MOMENTS else {"moments": list(own.moments)}


def _require_same_moments(reader: CheckpointReader, own: shards.Shards) -> None:
    stored = reader.state.get("moments", list(shards.MOMENTS))
    if stored != list(own.moments):
        raise CheckpointError(
            f"{reader.path} holds {' and '.join(stored)} of another optimiser, and this one "
            f"needs {' and '.join(own.moments)}; set optimizer.kind back, or begin another run"
        )


def generator_states(world: World) -> dict[str, Tensor]:
    """Only torch draws in the training process; workers' randomness is a function of position."""
    states = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(world.device)
    return states


def set_generator_states(states: dict[str, Tensor], world: World) -> None:
    """Set what `generator_states` gave."""
    torch.set_rng_state(states["cpu"])
    if world.device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], world.device)
