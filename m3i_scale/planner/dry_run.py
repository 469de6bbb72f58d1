"""What a run will be, before it starts: sizes, memory, steps, data."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from m3i_scale.engine.loop import Run
from m3i_scale.engine.zero import DTYPES


def state_memory(run: Run) -> dict[str, int]:
    """Bytes per rank of what lives as long as the run, by kind; activations come on top."""
    ranks = run.world.size
    width = DTYPES[run.config.engine.precision].itemsize
    trained = _elements(run.sharded.model, trained=True)
    return {
        "weights": trained * width // ranks,
        "fp32 master weights": trained * 4 // ranks if width < 4 else 0,
        "gradients (fp32)": trained * 4 // ranks,
        "Adam moments (fp32)": trained * 8 // ranks,
        **_teacher_memory(run),
    }


def _teacher_memory(run: Run) -> dict[str, int]:
    teacher = getattr(run.sharded.model, "teacher", None)
    if teacher is None:
        return {}
    weights = sum(_numel(p) for p in teacher.parameters())
    width = DTYPES[run.config.engine.precision].itemsize
    copies = run.world.size if run.config.engine.teacher == "sharded" else 1
    return {
        f"teacher ({run.config.engine.teacher})": weights * width // copies,
        "teacher averages (fp32)": 4 * weights // run.world.size,
    }


def describe(run: Run, sources: dict[str, dict[str, int | float | str]]) -> str:
    """The report of `--dry-run`."""
    return "\n".join([*_networks(run), *_memory(run), *_length(run), *_data(sources)]) + "\n"


def _networks(run: Run) -> Iterator[str]:
    model = run.sharded.model
    yield f"networks ({run.config.model.backbone.name}, tokens {model.grid[0]} x {model.grid[1]})"
    parts = dict(model.named_children())
    if hasattr(model, "teacher"):
        parts["teacher"] = model.teacher  # a whole teacher is no child
    for name, part in parts.items():
        count = sum(_numel(p) for p in part.parameters())
        if count:
            yield f"  {name:24s} {count / 1e6:12.3f} M"
    yield f"  {'trained in all':24s} {_elements(model, trained=True) / 1e6:12.3f} M"


def _memory(run: Run) -> Iterator[str]:
    kinds = state_memory(run)
    precision = run.config.engine.precision
    yield f"memory per rank on {run.world.size} ranks in {precision}, without activations"
    for kind, size in {**kinds, "in all": sum(kinds.values())}.items():
        yield f"  {kind:26s} {size / 2**30:12.3f} GiB"


def _length(run: Run) -> Iterator[str]:
    plan, schedule = run.split, run.schedule
    yield "length"
    parts = f"{plan.micro} x {plan.accumulation} accumulated x {run.world.size} ranks"
    yield f"  batch {plan.batch} = {parts}"
    targets = run.config.objective.targets
    among_samples = any(
        t.regularisation == "negatives" and t.representation != "category" for t in targets
    )
    if plan.accumulation > 1 and among_samples:
        # Every micro-step has a softmax of its own: accumulation brings no further negatives.
        yield f"  negatives come from the {plan.micro * run.world.size} samples of a micro-step"
    yield f"  {schedule.total} steps ({run.config.optimizer.duration}), warm-up {schedule.warmup}"
    yield f"  {schedule.total * plan.batch:,} samples; a checkpoint every {run.save_every} steps"


def _data(sources: dict[str, dict[str, int | float | str]]) -> Iterator[str]:
    yield "data"
    for name, facts in sources.items():
        yield (
            f"  {name} ({facts['kind']}): {facts['samples']:,} samples in {facts['shards']:,} "
            f"shards, {int(facts['bytes']) / 1e9:.3f} GB, "
            f"{100 * float(facts['share']):.2f} % of the stream"
        )


def _elements(model: nn.Module, *, trained: bool) -> int:
    return sum(_numel(p) for p in model.parameters() if p.requires_grad is trained)


def _numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, partitioned or not."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
