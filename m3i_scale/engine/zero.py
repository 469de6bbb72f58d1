"""DeepSpeed ZeRO: its configuration, and the networks with their sharded optimiser."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
from torch import nn

from m3i_scale.cluster.launch import World, drawing
from m3i_scale.cluster.numerics import set_numerics
from m3i_scale.config import ConfigError, Engine, Optimizer, RunConfig, Zero
from m3i_scale.config.load import merge
from m3i_scale.engine import communication, quick, shards
from m3i_scale.engine.first_pass import FirstPass
from m3i_scale.engine.flat import Flat
from m3i_scale.engine.lars import Lars
from m3i_scale.engine.momentum import (
    FlatTeacher,
    ShardedTeacher,
    Teacher,
    WeightAverages,
    WholeTeacher,
    start_equal,
)
from m3i_scale.engine.partitioned import Partitioned
from m3i_scale.engine.schedules import BatchSplit
from m3i_scale.engine.shards import Shards
from m3i_scale.engine.task import Task, has_teacher
from m3i_scale.models.precision import DTYPES


class Sharded(NamedTuple):
    """The networks, what drives them, and this rank's part of what ZeRO splits."""

    engine: deepspeed.DeepSpeedEngine
    model: nn.Module
    teacher: Teacher | None  # or the average of all weights
    shards: Shards
    first_pass: Callable[[], contextlib.AbstractContextManager[None]]


def deepspeed_config(spec: Engine, split: BatchSplit, *, clip_norm: float | None) -> dict[str, Any]:
    """The configuration handed to DeepSpeed; `engine.zero.extra` is merged in last."""
    generated: dict[str, Any] = {
        "train_batch_size": split.batch,
        "train_micro_batch_size_per_gpu": split.micro,
        "gradient_accumulation_steps": split.accumulation,
        "gradient_clipping": clip_norm or 0.0,
        "zero_optimization": _zero_section(spec.zero),
        "zero_allow_untested_optimizer": True,
        # Both are bf16 unless said otherwise, which would round what is accumulated and reduced.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # It would wait for the GPU twice a step; `images_per_second` measures the same.
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": 10**12,
    }
    if spec.precision != "fp32":
        generated[spec.precision] = {"enabled": True}
    settings = merge(generated, spec.zero.extra)
    stage = settings["zero_optimization"]["stage"]
    if stage != spec.zero.stage:
        raise ConfigError(
            f"engine.zero.extra says stage {stage} and engine.zero.stage {spec.zero.stage}; take "
            "it out of extra and set engine.zero.stage"
        )
    offload = settings["zero_optimization"].get("offload_optimizer") or {}
    if stage < 3 and offload:
        raise ConfigError(
            f"engine.zero.extra offloads the optimizer, which needs stage 3, not {stage}; set "
            "engine.zero.stage=3"
        )
    if offload.get("device") == "nvme":
        raise ConfigError(
            "engine.zero.extra offloads the optimizer to NVMe: its states would be missing in "
            "checkpoints; offload to the host's memory with engine.zero.offload_optimizer=true"
        )
    return settings


def _zero_section(zero: Zero) -> dict[str, Any]:
    section: dict[str, Any] = {
        "stage": zero.stage,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_bucket_size": zero.reduce_bucket,
    }
    if zero.stage == 3:
        section |= {
            "stage3_param_persistence_threshold": zero.persistence_threshold,
            "stage3_prefetch_bucket_size": zero.prefetch_bucket,
            "stage3_max_live_parameters": zero.max_live_parameters,
            "zero_hpz_partition_size": zero.hpz_partition,
        }
    else:
        section |= {
            # An all-reduce of a bucket as it is. What DeepSpeed calls a reduce-scatter here is an
            # all-reduce, too, of a copy, of which it copies every slice once more; and it averages
            # bf16 gradients in bf16.
            "reduce_scatter": False,
            "parameter_alignment": True,  # weights begin where kernels can read them
        }
    if zero.offload_optimizer:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return section


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    apart: nn.Module | None = None,
    factors: Mapping[str, float] | None = None,
    each: bool = False,
) -> list[dict[str, Any]]:
    """Optimiser groups: no decay on norms, biases, gates and the temperature (one-dimensional).

    Works on partitioned parameters, whose own shape is empty. The parameters of `apart` get groups
    to themselves, which changes no update.

    Args:
        model: the networks.
        weight_decay: of what decays.
        apart: a module of them.
        factors: of the learning rate, by the names of parameters; others have 1.
        each: a group for each parameter, for LARS, which adapts the rate where there is decay.
    """
    if each:
        whole = parameter_groups(model, weight_decay, apart=apart, factors=factors)
        return [
            group | {"params": [parameter], "adapt": group["decays"]}
            for group in whole
            for parameter in group["params"]
        ]
    own = {id(p) for p in apart.parameters()} if apart is not None else set()
    factors = factors or {}
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for part, decays in itertools.product((True, False), (True, False)):
        groups[part, 1.0, decays] = []
    for name, parameter in shards.trained(model):
        shape = getattr(parameter, "ds_shape", parameter.shape)
        key = id(parameter) in own, factors.get(name, 1.0), len(shape) > 1
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decays else 0.0,
            "decays": decays,
            "factor": factor,
        }
        for (_, factor, decays), parameters in groups.items()
        if parameters
    ]


def build(task: Task, world: World, split: BatchSplit) -> Sharded:
    """Construct the networks, partitioned from the start at stage 3, and the engine around them."""
    config = task.config
    settings = deepspeed_config(config.engine, split, clip_norm=config.optimizer.clip_norm)
    set_numerics(
        deterministic=config.engine.deterministic,
        at_times=config.engine.verify.every is not None,
    )
    communication.install()
    if config.engine.zero.stage == 3:
        return _build_partitioned(task, world, settings)
    return _build_flat(task, world, settings)


def _build_partitioned(task: Task, world: World, settings: dict[str, Any]) -> Sharded:
    """Stage 3."""
    config = task.config
    quick.prepare()
    partitioning = contextlib.nullcontext()
    if not task.built_whole:
        partitioning = deepspeed.zero.Init(config_dict_or_path=settings)
    with drawing(config.seed, world.device), partitioning:  # all ranks draw the same
        model = _networks(task)
    kind: type[ShardedTeacher | WholeTeacher]
    kind = ShardedTeacher if config.engine.teacher == "sharded" else WholeTeacher
    teacher, copy, student = None, None, None
    if has_teacher(model):
        student = model.student
        start_equal(student, model.teacher)
        copy = model.separate_teacher() if kind is WholeTeacher else model.teacher
    for module in task.leaves(model):
        deepspeed.utils.set_z3_leaf_module(module, True)
    groups = _groups(task, model)
    engine = _initialize(config, world, settings, model, groups)
    # DeepSpeed gathers these one by one after every step. Left alone they are gathered with the
    # blocks that need them first, and stay.
    engine.optimizer.persistent_parameters = []
    quick.finish(engine.optimizer, model)
    own = Partitioned(engine.optimizer)
    own.create_state()
    if student is not None and copy is not None:
        teacher = kind(own, student, copy, world.device)
    averages = teacher or _averages(task, own, model, world)
    return Sharded(engine, model, averages, own, FirstPass(engine.optimizer))


def _build_flat(task: Task, world: World, settings: dict[str, Any]) -> Sharded:
    """Stages 1 and 2."""
    config = task.config
    # Drawn in the dtype and on the device that stage 3 draws in: the same weights.
    dtype = deepspeed.OnDevice(dtype=DTYPES[config.engine.precision], device=world.device)
    with world.device:  # PyTorch lists the functions that follow a device once, so before `dtype`
        torch.empty(0)  # replaces them: else no later `with torch.device("meta")` has an effect
    with drawing(config.seed, world.device), world.device, dtype:
        model = _networks(task)
    teacher, copy, student = None, None, None
    if has_teacher(model):
        student = model.student
        start_equal(student, model.teacher)
        copy = model.separate_teacher()
    groups = _groups(task, model, apart=student)
    engine = _initialize(config, world, settings, model, groups)
    quick.finish_flat(engine.optimizer)
    own = Flat(engine.optimizer)
    own.create_state()
    if student is not None and copy is not None:
        teacher = FlatTeacher(own, student, copy, world.device)
    averages = teacher or _averages(task, own, model, world)
    return Sharded(engine, model, averages, own, contextlib.nullcontext)


def _groups(task: Task, model: nn.Module, apart: nn.Module | None = None) -> list[dict[str, Any]]:
    spec, factors = task.config.optimizer, task.rate_factors(model)
    return parameter_groups(model, spec.weight_decay, apart=apart, factors=factors, each=spec.lars)


def _averages(task: Task, own: Shards, model: nn.Module, world: World) -> WeightAverages | None:
    return WeightAverages(own, model, world.device) if task.averages else None


def _initialize(
    config: RunConfig,
    world: World,
    settings: dict[str, Any],
    model: nn.Module,
    groups: list[dict[str, Any]],
) -> deepspeed.DeepSpeedEngine:
    with _zero_optimizer():
        engine, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=_optimizer(
                config.optimizer, groups, world, offload=config.engine.zero.offload_optimizer
            ),
            config=settings,
        )
    engine.train()
    return engine


@contextlib.contextmanager
def _zero_optimizer() -> Iterator[None]:
    """Let DeepSpeed take ZeRO's optimiser at every stage, whatever the dtypes.

    At stage 1 with bf16 weights and fp32 gradients it would take another one (`BF16_Optimizer`),
    which reduces gradients after the backward pass only, and has other storage.
    """
    kind = deepspeed.DeepSpeedEngine
    shards.needed(kind, "_do_optimizer_sanity_check")
    original = kind._do_optimizer_sanity_check
    kind._do_optimizer_sanity_check = lambda *_: ZERO_OPTIMIZATION
    try:
        yield
    finally:
        kind._do_optimizer_sanity_check = original


def _networks(task: Task) -> nn.Module:
    try:
        return task.networks()
    except ValueError as error:
        raise ConfigError(f"the networks cannot be built: {error}") from error


def _optimizer(
    spec: Optimizer, groups: list[dict[str, Any]], world: World, *, offload: bool
) -> torch.optim.Optimizer:
    if spec.lars:
        return Lars(groups, lr=spec.learning_rate, momentum=spec.betas[0], epsilon=spec.epsilon)
    options: dict[str, Any] = {
        "lr": spec.learning_rate,
        "betas": spec.betas,
        "eps": spec.epsilon,
    }
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    return torch.optim.AdamW(groups, fused=world.device.type == "cuda", **options)


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, rate: float) -> None:
    """Set the rate of every parameter group, times its factor."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group["factor"]


@contextlib.contextmanager
def module_stack_kept() -> Iterator[None]:
    """Around a forward and backward pass: leave DeepSpeed's stack of open modules as it was.

    Recomputation ends as soon as it has what the backward pass needs, so that some modules are
    entered and never left, and the stack would grow for as long as the run lasts.
    """
    stack = parameter_offload.FWD_MODULE_STACK
    height = len(stack)
    yield
    del stack[height:]
