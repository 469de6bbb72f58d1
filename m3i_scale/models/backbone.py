"""The interface of image backbones, and the backbones by name."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from m3i_scale.models.intern_image import INTERN_IMAGE_VARIANTS, InternImage
from m3i_scale.models.vit import ViT


class Backbone(Protocol):
    """An image encoder with a map of features and a pooled vector.

    width      D, of the features
    embed_dim  E, of the pooled vector
    stride     pixels per feature, 16 in all published models
    pooling    the module that `pool` adds to the features; frozen where no target is pooled
    """

    width: int
    embed_dim: int
    stride: int

    @property
    def pooling(self) -> nn.Module:
        """All parameters that `pool` reads and `features` does not."""
        ...

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of the feature map; ValueError for a size that does not fit."""
        ...

    def features(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Map images (B, 3, H, W) to tokens (B, N, D), row-major over the grid.

        What a row draws in training is a function of its key, int64 (B,), and of nothing else;
        without keys the default generator draws.
        """
        ...

    def pool(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Pool tokens (B, N, D), all or those where keep (B, N) is True, to (B, E)."""
        ...


_MOST_BLOCKS, _LARGEST_SIZE = 1000, 1_000_000
_PRETRAINING = {"use_clip_projector": True, "num_classes": 0}

# name -> class and the options that the name stands for
_BACKBONES: dict[str, tuple[Callable[..., Any], Mapping[str, Any]]] = {
    "intern_image": (InternImage, _PRETRAINING),
    **{
        f"intern_image_{size}": (InternImage, {**variant, **_PRETRAINING})
        for size, variant in INTERN_IMAGE_VARIANTS.items()
    },
    "vit": (ViT, {}),
    "vit_b16": (ViT, {"width": 768, "depth": 12, "heads": 12, "patch_size": 16}),
}
BACKBONE_NAMES = tuple(_BACKBONES)


def build_backbone(name: str, **options: Any) -> Backbone:
    """Build `intern_image_t` to `intern_image_g`, `vit_b16`, or `intern_image`, `vit` with options.

    Options are those of the class's constructor and override what the name stands for. InternImage
    of every size comes with the fused map and without a classifier. Raises ValueError for unknown
    names, unknown options and missing ones, and for values that no network has.
    """
    build, merged = backbone_options(name, options)
    try:
        return build(**merged)
    except ValueError:
        raise
    except (
        TypeError, ArithmeticError, AssertionError, LookupError, RuntimeError, MemoryError,
    ) as error:  # fmt: skip
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"backbone {name} cannot be built with {_shown(options)}: {reason}"
        ) from error


def backbone_options(
    name: str, options: Mapping[str, Any]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The class that `build_backbone` calls for a name and options, and the arguments it gives.

    Raises ValueError as `build_backbone`.
    """
    if name not in _BACKBONES:
        raise ValueError(f"backbone {name!r}: {_suggest(name, list(_BACKBONES))}")
    build, defaults = _BACKBONES[name]
    parameters = inspect.signature(build).parameters
    for option in options:
        if option not in parameters:
            raise ValueError(f"backbone {name}, option {option!r}: {_suggest(option, parameters)}")
    merged = {**defaults, **options}
    _require_possible(name, options)
    missing = [p for p in parameters.values() if p.default is p.empty and p.name not in merged]
    if missing:
        raise ValueError(f"backbone {name} needs {', '.join(p.name for p in missing)}")
    return build, merged


def _require_possible(name: str, options: Mapping[str, Any]) -> None:
    """Refuse numbers of blocks that would be built for hours, and sizes that no memory holds."""
    for option, value in options.items():
        most = _MOST_BLOCKS if option in ("depth", "depths") else _LARGEST_SIZE
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and not -most <= number <= most:
                raise ValueError(f"backbone {name}: {option} is {value!r}; {most:,} is the most")


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{option}: {value!r}" for option, value in options.items()) or "no options"


def with_defaults(build: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The given arguments of a backbone's class and the defaults of the others.

    In the order of its signature; what it has no parameter for comes last.
    """
    parameters = inspect.signature(build).parameters.values()
    known = [p for p in parameters if p.name in given or p.default is not p.empty]
    return {p.name: p.default for p in known} | dict(given)


def _suggest(word: str, valid: Any) -> str:
    close = difflib.get_close_matches(word, list(valid), n=2)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}known are {', '.join(valid)}"
