"""What a run will be, before it starts: sizes, memory, steps, data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from m3i_scale.engine.loop import Run
from m3i_scale.engine.task import has_teacher, uses_frozen
from m3i_scale.engine.zero import deepspeed_config
from m3i_scale.planner.state import lasting_memory
from m3i_scale.profiling.record import Weight


def describe(run: Run, sources: dict[str, dict[str, int | float | str]]) -> str:
    """The report of `--dry-run`."""
    parts = (_networks(run), _initial(run), _memory(run), _length(run), _data(sources))
    return "".join(f"{line}\n" for part in parts for line in part)


def _networks(run: Run) -> Iterator[str]:
    model = run.sharded.model
    yield f"networks ({run.task.title(model)})"
    parts = dict(model.named_children())
    if has_teacher(model):
        parts["teacher"] = model.teacher  # a whole teacher is no child
    parts |= {f"frozen {name}": module for name, module in _frozen(run).items()}
    for name, part in parts.items():
        count = sum(_numel(p) for p in part.parameters())
        if count:
            yield f"  {name:24s} {count / 1e6:12.3f} M"
    yield f"  {'trained in all':24s} {_elements(model, trained=True) / 1e6:12.3f} M"


def _initial(run: Run) -> Iterator[str]:
    """What the backbone starts from."""
    init = run.task.init
    if init is None:
        return
    yield f"model.init {init}"
    if run.initial is None:
        yield "  is not read: the run goes on from its checkpoint"
    else:
        yield from (f"  {line}" for line in run.initial.lines())


def _memory(run: Run) -> Iterator[str]:
    """What lives as long as the run, as `m3i plan` counts it."""
    ranks, spec = run.world.size, run.config.engine
    settings = deepspeed_config(spec, run.split, clip_norm=run.config.optimizer.clip_norm)
    frozen = sum(p.numel() for module in _frozen(run).values() for p in module.parameters())
    device, host = lasting_memory(
        spec, _weights(run), ranks, settings, frozen,
        averaged=run.task.averages, moments=run.config.optimizer.moments,
    )  # fmt: skip
    yield f"memory per rank on {ranks} ranks in {spec.precision}, without activations"
    for kinds, where in ((device, ""), (host, " (host)")):
        for kind, size in kinds.items():
            if size:
                yield f"  {kind + where:24s} {size / 2**30:12.3f} GiB"
        if kinds:
            yield f"  {'in all' + where:24s} {sum(kinds.values()) / 2**30:12.3f} GiB"


def _frozen(run: Run) -> Mapping[str, nn.Module]:
    """Networks outside of the engine's module that nothing changes."""
    model = run.sharded.model
    return model.frozen if uses_frozen(model) else {}


def _weights(run: Run) -> list[Weight]:
    """All weights, a teacher's outside of the engine's module among them."""
    found = dict(run.sharded.model.named_parameters())
    teacher = run.sharded.teacher.teacher if run.sharded.teacher else None
    if teacher is not None:
        found |= teacher.named_parameters("teacher")
    return [
        Weight(name, name.rpartition(".")[0], _numel(p), p.requires_grad)
        for name, p in found.items()
    ]


def _length(run: Run) -> Iterator[str]:
    plan, schedule = run.split, run.schedule
    yield "length"
    parts = f"{plan.micro} x {plan.accumulation} accumulated x {run.world.size} ranks"
    yield f"  batch {plan.batch} = {parts}"
    yield f"  {schedule.total} steps ({run.config.optimizer.duration}), warm-up {schedule.warmup}"
    yield f"  {schedule.total * plan.batch:,} samples; a checkpoint every {run.save_every} steps"
    notes = run.task.notes(run.sharded.model, plan, run.world.size, schedule.total)
    yield from (f"  {note}" for note in notes)


def _data(sources: dict[str, dict[str, int | float | str]]) -> Iterator[str]:
    yield "data"
    for name, facts in sources.items():
        place = ""  # a set of single files has no shards
        if "shards" in facts:
            place = f" in {facts['shards']:,} shards, {int(facts['bytes']) / 1e9:.3f} GB"
        yield (
            f"  {name} ({facts['kind']}): {facts['samples']:,} samples{place}, "
            f"{100 * float(facts['share']):.2f} % of the stream"
        )


def _elements(model: nn.Module, *, trained: bool) -> int:
    return sum(_numel(p) for p in model.parameters() if p.requires_grad is trained)


def _numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, partitioned or not."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
