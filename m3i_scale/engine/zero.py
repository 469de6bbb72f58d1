"""DeepSpeed ZeRO: its configuration, and the networks with their sharded optimiser."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
from torch import nn

from m3i_scale.cluster.launch import World
from m3i_scale.cluster.numerics import set_numerics
from m3i_scale.config import Config, ConfigError, Engine, Optimizer, Zero
from m3i_scale.config.load import merge
from m3i_scale.engine import quick, shards
from m3i_scale.engine.first_pass import FirstPass
from m3i_scale.engine.flat import Flat
from m3i_scale.engine.momentum import (
    FlatTeacher,
    ShardedTeacher,
    Teacher,
    WholeTeacher,
    start_equal,
)
from m3i_scale.engine.partitioned import Partitioned
from m3i_scale.engine.schedules import BatchSplit
from m3i_scale.engine.shards import Shards
from m3i_scale.models.precision import DTYPES
from m3i_scale.objective.m3i import M3I


class Sharded(NamedTuple):
    """The networks, what drives them, and this rank's part of what ZeRO splits."""

    engine: deepspeed.DeepSpeedEngine
    model: M3I
    teacher: Teacher | None
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
    model: nn.Module, weight_decay: float, *, apart: nn.Module | None = None
) -> list[dict[str, Any]]:
    """AdamW groups: no decay on norms, biases, gates and the temperature (all one-dimensional).

    Works on partitioned parameters, whose own shape is empty. The parameters of `apart` get groups
    to themselves, which changes no update.
    """
    own = {id(p) for p in apart.parameters()} if apart is not None else set()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for key in itertools.product((True, False), (True, False)):
        groups[key] = []
    for _, parameter in shards.trained(model):
        shape = getattr(parameter, "ds_shape", parameter.shape)
        groups[id(parameter) in own, len(shape) > 1].append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        for (_, decays), parameters in groups.items()
        if parameters
    ]


def build(config: Config, world: World, split: BatchSplit) -> Sharded:
    """Construct the networks, partitioned from the start at stage 3, and the engine around them."""
    settings = deepspeed_config(config.engine, split, clip_norm=config.optimizer.clip_norm)
    set_numerics(deterministic=config.engine.deterministic)
    if config.engine.zero.stage == 3:
        return _build_partitioned(config, world, settings)
    return _build_flat(config, world, settings)


def _build_partitioned(config: Config, world: World, settings: dict[str, Any]) -> Sharded:
    """Stage 3."""
    quick.prepare()
    with _same_draws(config, world), deepspeed.zero.Init(config_dict_or_path=settings):
        model = _networks(config)
    kind: type[ShardedTeacher | WholeTeacher]
    kind = ShardedTeacher if config.engine.teacher == "sharded" else WholeTeacher
    copy = None
    if hasattr(model, "teacher"):
        start_equal(model.student, model.teacher)
        copy = model.separate_teacher() if kind is WholeTeacher else model.teacher
    _gather_blocks_at_once(model)
    groups = parameter_groups(model, config.optimizer.weight_decay)
    engine = _initialize(config, world, settings, model, groups)
    # DeepSpeed gathers these one by one after every step. Left alone they are gathered with the
    # blocks that need them first, and stay.
    engine.optimizer.persistent_parameters = []
    quick.finish(engine.optimizer, model)
    own = Partitioned(engine.optimizer)
    own.create_adam_state()
    teacher = None if copy is None else kind(own, model.student, copy, world.device)
    return Sharded(engine, model, teacher, own, FirstPass(engine.optimizer))


def _build_flat(config: Config, world: World, settings: dict[str, Any]) -> Sharded:
    """Stages 1 and 2."""
    # Drawn in the dtype and on the device that stage 3 draws in: the same weights.
    dtype = deepspeed.OnDevice(dtype=DTYPES[config.engine.precision], device=world.device)
    with _same_draws(config, world), world.device, dtype:
        model = _networks(config)
    copy = None
    if hasattr(model, "teacher"):
        start_equal(model.student, model.teacher)
        copy = model.separate_teacher()
    apart = model.student if copy is not None else None
    groups = parameter_groups(model, config.optimizer.weight_decay, apart=apart)
    engine = _initialize(config, world, settings, model, groups)
    quick.finish_flat(engine.optimizer)
    own = Flat(engine.optimizer)
    own.create_adam_state()
    teacher = None if copy is None else FlatTeacher(own, model.student, copy, world.device)
    return Sharded(engine, model, teacher, own, contextlib.nullcontext)


@contextlib.contextmanager
def _same_draws(config: Config, world: World) -> Iterator[None]:
    """The same weights whatever the number of ranks: all draw the same, and keep their part."""
    with torch.random.fork_rng(devices=[world.device] if world.device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        yield


def _initialize(
    config: Config,
    world: World,
    settings: dict[str, Any],
    model: M3I,
    groups: list[dict[str, Any]],
) -> deepspeed.DeepSpeedEngine:
    with _zero_optimizer():
        engine, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=_adamw(
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


def _gather_blocks_at_once(model: M3I) -> None:
    """Let ZeRO-3 gather, reduce and release whole blocks, instead of every layer by itself.

    A block's gradients are reduced when its backward pass has ended, which DeepSpeed does again for
    every pass: only for blocks that run once.
    """
    for block in model.blocks_run_once():
        deepspeed.utils.set_z3_leaf_module(block, True)


def _networks(config: Config) -> M3I:
    try:
        return M3I(config.model, config.objective, config.data.image_size)
    except ValueError as error:
        raise ConfigError(f"the networks cannot be built: {error}") from error


def _adamw(
    spec: Optimizer, groups: list[dict[str, Any]], world: World, *, offload: bool
) -> torch.optim.Optimizer:
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
    """Set the rate of every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


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
