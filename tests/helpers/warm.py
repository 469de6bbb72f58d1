"""Imported by the server that ranks are forked from: what each rank would else do for itself."""

from __future__ import annotations

import contextlib
import gc
import importlib

import m3i_scale.engine.session  # noqa: F401  with PyTorch, DeepSpeed and transformers

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
