"""Imported by the server that ranks are forked from: what each rank would else do for itself."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path

import m3i_scale.engine.session  # noqa: F401  with PyTorch, DeepSpeed and transformers
from helpers.small import small_config
from m3i_scale.profiling.flops import step_flops

# Imported by every start of an engine; its decorators bring all of torch.compile with them.
with contextlib.suppress(ImportError):  # not in every version of DeepSpeed
    importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
# PyTorch learns here what the operators do to shapes. No operator runs and no thread is started.
config = small_config(Path())
step_flops(config.model, config.objective, config.data.image_size)
