"""Networks of timm and transformers that see images (`m3i_scale.models.frozen.Network`).

They are built from names and numbers alone: descriptions may come from strangers, so that nothing
in them may name code, files or repositories.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from m3i_scale.models.frozen import Seen

# Arguments with which `timm.create_model` would read files or fetch something.
_READING = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir",
    "pretrained_strict", "scriptable", "exportable", "no_jit", "features_only",
}  # fmt: skip
# Keys of a configuration of transformers that name code or how it runs.
_CODE = {
    "auto_map",
    "attn_implementation",
    "use_kernels",
    "quantization_config",
    "custom_pipelines",
}


def build_timm(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A model of timm by its name and arguments, without a classifier, drawn at random.

    Raises:
        ValueError: timm has no such model, or does not build it so.
    """
    import timm

    if not timm.is_model(architecture):
        raise ValueError(f"timm has no model {architecture!r}; `timm.list_models()` lists them")
    reading = sorted(_READING & arguments.keys())
    if reading:
        raise ValueError(f"timm's {reading[0]} says how to read weights, not what they are of")
    # timm's ViTs take images of every size with this; other networks do not know it.
    given = {**arguments, "num_classes": 0}
    for more in ({"dynamic_img_size": True}, {}):
        try:
            model: nn.Module = timm.create_model(architecture, **(more | given))
        except Exception as error:  # whatever timm makes of arguments that it does not know
            if more and "dynamic_img_size" in str(error):
                continue
            raise ValueError(
                f"timm builds no {architecture} of {dict(arguments)}: {error}"
            ) from None
        return model
    raise AssertionError  # the last turn returned or raised


class TimmNetwork(nn.Module):
    """A model of timm: its last map, normalised as for its head, and its head's pooled vector."""

    def __init__(self, architecture: str, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = build_timm(architecture, arguments)
        if not hasattr(self.model, "forward_intermediates"):
            raise ValueError(f"timm's {architecture} gives no map of features; take another model")

    def forward(self, images: Tensor) -> Seen:
        """See `Seen`."""
        last, maps = self.model.forward_intermediates(  # type: ignore[operator]
            images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=False
        )
        return Seen(maps[0], self.model.forward_head(last, pre_logits=True))  # type: ignore[operator]

    def fill(self, state: Mapping[str, Tensor]) -> set[str]:
        """Copy weights in; the names of those that were used.

        Raises:
            ValueError: they do not fit.
        """
        heads = self.model.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
        heads = (heads,) if isinstance(heads, str) else tuple(heads)
        used = {n: t for n, t in state.items() if not n.startswith(tuple(f"{h}." for h in heads))}
        _require_fit(self.model.state_dict(), used)
        self.model.load_state_dict(used)
        return set(used)


def _require_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    shapes = [
        f"{n} {tuple(state[n].shape)} for {tuple(own[n].shape)}"
        for n in own.keys() & state.keys()
        if own[n].shape != state[n].shape
    ]
    _refuse(
        {
            "missing": sorted(own.keys() - state.keys()),
            "unknown": sorted(state.keys() - own.keys()),
            "of another shape": sorted(shapes),
        }
    )


def _refuse(faults: Mapping[str, list[str]]) -> None:
    said = [f"{len(n)} {what}: {', '.join(n[:3])}" for what, n in faults.items() if n]
    if said:
        raise ValueError(f"the weights are of another network: {'; '.join(said)}")


def vision_config(content: Mapping[str, Any]) -> Any:
    """The configuration of the image encoder that a config.json of transformers describes.

    Raises:
        ValueError: it describes none that the installed version knows.
    """
    from transformers import CONFIG_MAPPING

    kind = content.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"the installed transformers knows no model_type {kind!r}")
    try:
        config = CONFIG_MAPPING[kind].from_dict(_plain(content))
    except Exception as error:  # whatever transformers makes of values that it does not know
        raise ValueError(f"transformers takes no such config.json of {kind}: {error}") from None
    return getattr(config, "vision_config", None) or config


def _plain(value: Any) -> Any:
    """Without the keys that name code."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if k not in _CODE and k[:1] != "_"}
    return [_plain(v) for v in value] if isinstance(value, list) else value


class TransformersNetwork(nn.Module):
    """A model of transformers: its last tokens as a map, and its pooled vector.

    The pooled vector is that of its pooling where the weights have one, else the class token, else
    the mean of the tokens.

    Args:
        config: of the model.
        names: of the weights that it will get.

    Raises:
        ValueError: transformers does not build it, or it sees no images.
    """

    def __init__(self, config: Any, names: Iterable[str]) -> None:
        super().__init__()
        from transformers import AutoModel

        self.config = config
        try:
            self.model: nn.Module = AutoModel.from_config(config)
        except Exception as error:  # whatever transformers makes of it
            raise ValueError(f"transformers builds no {config.model_type}: {error}") from None
        trained = any(_is_pooling(name) for name in names)
        self.pools = trained or not any(_is_pooling(n) for n, _ in self.model.named_parameters())
        taken = inspect.signature(self.model.forward).parameters
        if "pixel_values" not in taken:
            raise ValueError(f"transformers' {config.model_type} sees no images")
        self._named = {"interpolate_pos_encoding"} & taken.keys()

    def forward(self, images: Tensor) -> Seen:
        """See `Seen`."""
        named = dict.fromkeys(self._named, True)
        output = self.model(pixel_values=images, **named)
        last = output.last_hidden_state
        pooled = getattr(output, "pooler_output", None) if self.pools else None
        if last.dim() == 4:
            return Seen(last, last.mean((2, 3)) if pooled is None else pooled.flatten(1))
        grid = self._grid(images.shape[-1], last.shape[1])
        prefix = last.shape[1] - grid * grid
        tokens = last[:, prefix:]
        if pooled is None:
            pooled = last[:, 0] if prefix else tokens.mean(1)
        return Seen(tokens.transpose(1, 2).unflatten(2, (grid, grid)), pooled)

    def _grid(self, size: int, tokens: int) -> int:
        """Patches along one side: class and other tokens stand before those of the patches."""
        patch = getattr(self.config, "patch_size", None) or size
        patch = patch if isinstance(patch, int) else patch[0]
        plain = size // patch
        return plain if 0 <= tokens - plain * plain <= 16 else math.isqrt(tokens)

    def fill(self, state: Mapping[str, Tensor]) -> set[str]:
        """Copy weights in, under whatever names transformers knows; the names of those used.

        Raises:
            ValueError: they do not fit.
        """
        kind: Any = type(self.model)
        with _silent():
            self.model, found = kind.from_pretrained(
                None, config=self.config, state_dict=dict(state), output_loading_info=True,
                ignore_mismatched_sizes=True, dtype=torch.float32,
            )  # fmt: skip
        missing = [n for n in sorted(found["missing_keys"]) if self.pools or not _is_pooling(n)]
        shapes = [f"{n} {tuple(a)} for {tuple(b)}" for n, a, b in found["mismatched_keys"]]
        _refuse({"missing": missing, "of another shape": sorted(shapes)})
        return set(state) - set(found["unexpected_keys"])


def _is_pooling(name: str) -> bool:
    return name.startswith("pooler.") or ".pooler." in name


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What is missing is ours to say; progress bars of all ranks help nobody."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
