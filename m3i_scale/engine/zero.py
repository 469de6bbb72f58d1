"""DeepSpeed ZeRO-3: its configuration, and the partitioned networks with their optimiser."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.runtime.zero import parameter_offload
from torch import nn

from m3i_scale.cluster.launch import World
from m3i_scale.cluster.numerics import set_numerics
from m3i_scale.config import Config, ConfigError, Engine, Optimizer, Zero
from m3i_scale.config.load import merge
from m3i_scale.engine import quick, shards
from m3i_scale.engine.first_pass import FirstPass
from m3i_scale.engine.momentum import ShardedTeacher, Teacher, WholeTeacher, start_equal
from m3i_scale.engine.schedules import BatchSplit
from m3i_scale.objective.m3i import M3I


class Sharded(NamedTuple):
    """The partitioned networks and what drives them."""

    engine: deepspeed.DeepSpeedEngine
    model: M3I
    teacher: Teacher | None
    first_pass: FirstPass


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
    offload = settings["zero_optimization"].get("offload_optimizer") or {}
    if offload.get("device") == "nvme":
        raise ConfigError(
            "engine.zero.extra offloads the optimizer to NVMe: its states would be missing in "
            "checkpoints; offload to the host's memory with engine.zero.offload_optimizer=true"
        )
    return settings


def _zero_section(zero: Zero) -> dict[str, Any]:
    section: dict[str, Any] = {
        "stage": 3,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "stage3_param_persistence_threshold": zero.persistence_threshold,
        "stage3_prefetch_bucket_size": zero.prefetch_bucket,
        "reduce_bucket_size": zero.reduce_bucket,
        "stage3_max_live_parameters": zero.max_live_parameters,
        "zero_hpz_partition_size": zero.hpz_partition,
    }
    if zero.offload_optimizer:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return section


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: no decay on norms, biases, gates and the temperature (all one-dimensional).

    Works on partitioned parameters, whose own shape is empty.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for _, parameter in shards.trained(model):
        shape = getattr(parameter, "ds_shape", parameter.shape)
        groups[len(shape) > 1].append(parameter)
    decays = {True: weight_decay, False: 0.0}
    return [{"params": ps, "weight_decay": decays[d]} for d, ps in groups.items() if ps]


def build(config: Config, world: World, split: BatchSplit) -> Sharded:
    """Construct the networks partitioned from the start, and the engine around them."""
    settings = deepspeed_config(config.engine, split, clip_norm=config.optimizer.clip_norm)
    set_numerics(deterministic=config.engine.deterministic)
    quick.prepare()
    # The same weights whatever the number of ranks: all ranks draw the same, and keep their slice.
    with torch.random.fork_rng(devices=[world.device] if world.device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        with deepspeed.zero.Init(config_dict_or_path=settings):
            model = _networks(config)
    kind: type[Teacher] = ShardedTeacher if config.engine.teacher == "sharded" else WholeTeacher
    copy = None
    if hasattr(model, "teacher"):
        start_equal(model.student, model.teacher)
        copy = model.separate_teacher() if kind is WholeTeacher else model.teacher
    _gather_blocks_at_once(model)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=_adamw(
            config.optimizer, model, world, offload=config.engine.zero.offload_optimizer
        ),
        config=settings,
    )
    # DeepSpeed gathers these one by one after every step. Left alone they are gathered with the
    # blocks that need them first, and stay.
    engine.optimizer.persistent_parameters = []
    quick.finish(engine.optimizer, model)
    shards.share_weights(engine.optimizer)
    shards.create_adam_state(engine.optimizer)
    engine.train()
    teacher = None
    if copy is not None:
        teacher = kind(engine.optimizer, model.student, copy, world.device)
    return Sharded(engine, model, teacher, FirstPass(engine.optimizer))


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
    spec: Optimizer, model: nn.Module, world: World, *, offload: bool
) -> torch.optim.Optimizer:
    groups = parameter_groups(model, spec.weight_decay)
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
