"""Imported by the server that ranks are forked from: what each rank would else do for itself."""

from __future__ import annotations

import contextlib
import gc
import importlib

import pytest  # noqa: F401  the ranks import the tests' modules

import helpers.training  # noqa: F401  with PyTorch, DeepSpeed and transformers
import m3i_scale.tasks.classification.task
import m3i_scale.tasks.detection.task
import m3i_scale.tasks.segmentation.task  # noqa: F401

# Imported by every start of an engine, in versions of DeepSpeed that have them; the first brings
# all of torch.compile along.
LATE = (
    "runtime.zero.muon.original_muon",
    "runtime.zero.muon.muon_optimizer",
    "runtime.superoffload.superoffload_stage3",
    "module_inject.auto_ep_layer",
    "module_inject.auto_ep_presets.registry",
)
for name in LATE:
    with contextlib.suppress(ImportError):
        importlib.import_module(f"deepspeed.{name}")

gc.freeze()  # a collection in a rank would copy all that has been imported
