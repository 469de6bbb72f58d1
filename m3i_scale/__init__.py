"""Single-stage multi-modal pre-training (M3I) of billion-parameter image backbones.

    import m3i_scale

    config = m3i_scale.load_config("configs/demo.yaml", ["optimizer.warmup=0 steps"])
    backbone = m3i_scale.build_backbone("intern_image_t")     # an untrained network
    backbone = m3i_scale.load_backbone("backbone.safetensors")  # file or folder of `m3i export`
    state = m3i_scale.load_published("internimage_t.safetensors")  # a published state dict

Importing the package imports nothing else: each name is imported when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m3i_scale.config import load_config
    from m3i_scale.models.backbone import build_backbone
    from m3i_scale.models.weights import load_published
    from m3i_scale.transfer.export import load_backbone

__version__ = "0.2.0"

_HOMES = {
    "build_backbone": "m3i_scale.models.backbone",
    "load_backbone": "m3i_scale.transfer.export",
    "load_config": "m3i_scale.config",
    "load_published": "m3i_scale.models.weights",
}

__all__ = ["__version__", "build_backbone", "load_backbone", "load_config", "load_published"]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
