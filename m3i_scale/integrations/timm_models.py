"""InternImage for timm. Importing this module registers intern_image_t to intern_image_g.

    import timm, m3i_scale.integrations.timm_models
    model = timm.create_model("intern_image_t", pretrained=True)
    levels = timm.create_model("intern_image_b", features_only=True)

`intern_image` has the sizes of T and takes all arguments of `InternImage`. State dicts have the
names of `InternImage`. H and G come with the head of their M3I pre-training: their features are the
fused stride-16 map and their pooling is the attention pooling; the other sizes get it with
`use_clip_projector=True`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from m3i_scale.models.dcn import DCNv3
from m3i_scale.models.intern_image import INTERN_IMAGE_VARIANTS, InternImage
from m3i_scale.models.layers import Linear
from m3i_scale.models.weights import WEIGHT_KEYS, plain_name

log = logging.getLogger(__name__)

__all__: list[str] = []  # register_model adds the entry points
register_notrace_module(DCNv3)


@register_notrace_function
def require_half(fine: Tensor, coarse: Tensor) -> Tensor:
    """Give `coarse` (B, C, H/2, W/2) back; ValueError where `fine` is not twice its size."""
    if fine.shape[-2:] != tuple(2 * side for side in coarse.shape[-2:]):
        raise ValueError("image height and width must be multiples of 32 for the fused map")
    return coarse


class TimmInternImage(InternImage):
    """InternImage with the methods of timm's models; maps are (B, C, H, W).

    num_classes     0 gives the pooled vector instead of logits
    in_chans        channels of the images
    global_pool     `avg` (H and G: their attention pooling), or `""` for the map itself
    drop_rate       dropout before the classifier
    pre_classifier  whether there are layers between pooling and classifier (the 1x1 convolution of
        T to XL, the norm of H and G); M3I pre-training has none
    options         those of `InternImage`; `drop_path_rate` is 0 unless stated

    Raises ValueError for options that do not go together.
    """

    output_fmt = "NCHW"

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        pre_classifier: bool = True,
        **options: Any,
    ) -> None:
        # With a class, those other layers are built, too.
        super().__init__(num_classes=max(num_classes, 1) if pre_classifier else 0, **options)
        channels = self.patch_embed.conv2.out_channels
        if in_chans != 3:
            self.patch_embed.conv1 = nn.Conv2d(in_chans, channels // 2, 3, stride=2, padding=1)
        for name in ("conv_head", "fc_norm"):
            if not hasattr(self, name):
                setattr(self, name, nn.Identity())
        self.head_drop = nn.Dropout(drop_rate)
        self.feature_info = [
            {"num_chs": channels * 2**i, "reduction": 4 * 2**i, "module": f"levels.{i}"}
            for i in range(4)
        ]
        self.num_features = self.width if self.use_clip_projector else 8 * channels
        if self.use_clip_projector:
            self.head_hidden_size = self.embed_dim
        else:
            self.head_hidden_size = 12 * channels if pre_classifier else 8 * channels
        self.global_pool = "avg"
        self.reset_classifier(num_classes, global_pool)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the layers, for layer decay: a layer is a block (coarse: a stage)."""
        fine = [
            (r"^levels\.(\d+)\.blocks\.(\d+)", None),
            (r"^levels\.(\d+)\.(?:norm|downsample|post_norms)", (99999,)),  # as the block before
        ]
        return {"stem": r"^patch_embed", "blocks": r"^levels\.(\d+)" if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass."""
        for level in self.levels:
            level.checkpoint_blocks = enable  # type: ignore[assignment]

    def no_weight_decay(self) -> set[str]:
        """No parameter but those of one dimension, which timm knows by itself."""
        return set()

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Draw a new classifier (0: none); `""` removes the pooling and all that follows it.

        Raises:
            ValueError: another pooling, a classifier without pooling, or pooling once removed.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in ("avg", ""):
            raise ValueError(f"global_pool={pool!r}: InternImage has 'avg' and ''")
        if num_classes and not pool:
            raise ValueError("a classifier needs pooling: num_classes=0, or global_pool='avg'")
        if pool and not self.global_pool:
            raise ValueError("the pooling was removed; create the model anew")
        self.num_classes, self.global_pool = num_classes, pool
        if not pool:
            for name in ("conv_head", "fc_norm", "clip_projector"):
                if hasattr(self, name):
                    setattr(self, name, nn.Identity())
            self.head_hidden_size = self.num_features
        width = self.head_hidden_size
        self.head = Linear(width, num_classes) if num_classes else nn.Identity()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps of the chosen stages and, unless `intermediates_only`, before them the features."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r}: InternImage has 'NCHW' and 'NHWC'")
        take, last = feature_take_indices(4, indices)
        maps = []
        y: Tensor | None = self.patch_embed(x)
        levels = self.levels[: last + 1] if stop_early else self.levels
        for level, drawn in zip(levels, self.draw(x), strict=False):
            stage, y = level(y, drawn)
            maps.append(stage)
        taken = [maps[i] if output_fmt == "NHWC" else maps[i].permute(0, 3, 1, 2) for i in take]
        return taken if intermediates_only else (self._last(maps), taken)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the chosen stages do not need; the stages that stay, as numbers."""
        take, last = feature_take_indices(4, indices)
        self.levels = self.levels[: last + 1]
        self.levels[last].downsample = None
        for name in ("dcnv3_head_x3", "dcnv3_head_x4"):
            if hasattr(self, name):
                delattr(self, name)
        self.num_features = self.feature_info[last]["num_chs"]
        if prune_head:
            self.reset_classifier(0, "")
        return list(take)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's map (B, 8C, H/32, W/32), or the fused one (B, D, H/16, W/16)."""
        return self._last(self.forward_stages(x))

    def _last(self, maps: Sequence[Tensor]) -> Tensor:
        maps = [x.permute(0, 3, 1, 2) for x in maps[-2:]]
        if not hasattr(self, "dcnv3_head_x4"):
            return maps[-1]
        fine, coarse = maps
        return self.dcnv3_head_x4(require_half(fine, coarse)) + self.dcnv3_head_x3(fine)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Of the features, the logits or, with `pre_logits`, what the classifier sees."""
        if self.global_pool and self.use_clip_projector:
            x = self.fc_norm(self.pool(x.flatten(2).transpose(1, 2)))
        elif self.global_pool:
            x = self.conv_head(x).mean((2, 3))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(images))


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Weights of timm, of the Hub or of a published file under the names of `model`."""
    for key in WEIGHT_KEYS:
        if isinstance(state.get(key), dict):
            state = state[key]
    named: dict[str, Tensor] = {plain_name(name): value for name, value in state.items()}
    layers = ("conv_head.", "fc_norm.")  # what `pre_classifier` asks for
    own = {name: value for name, value in model.state_dict().items() if name.startswith(layers)}
    if "head.weight" not in named and own.keys() - named.keys():
        log.warning("a backbone without a classifier: %s are new", ", ".join(own))
        named |= own
    return {n: value for n, value in named.items() if n in own or not n.startswith(layers)}


def _cfg(size: int = 224, stride: int = 32, **more: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // stride, size // stride),
        "crop_pct": 0.875 if size <= 224 else 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.conv1",
        "classifier": "head",
        "license": "mit",
        **more,
    }


def _hub(name: str, size: int, stride: int = 32) -> dict[str, Any]:
    return _cfg(size, stride, hf_hub_id=f"OpenGVLab/internimage_{name}")


default_cfgs = generate_default_cfgs(
    {
        "intern_image": _cfg(),
        "intern_image_t.in1k": _hub("t_1k_224", 224),
        "intern_image_s.in1k": _hub("s_1k_224", 224),
        "intern_image_b.in1k": _hub("b_1k_224", 224),
        "intern_image_l.in22k_ft_in1k_384": _hub("l_22kto1k_384", 384),
        "intern_image_xl.in22k_ft_in1k_384": _hub("xl_22kto1k_384", 384),
        "intern_image_h.joint_in22k_ft_in1k_640": _hub("h_22kto1k_640", 640, 16),
        "intern_image_g.joint_in22k_ft_in1k_512": _hub("g_22kto1k_512", 512, 16),
    }
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    size = name.removeprefix("intern_image").removeprefix("_") or "t"
    options = {**INTERN_IMAGE_VARIANTS[size], "drop_path_rate": 0.0}
    return build_model_with_cfg(
        TimmInternImage,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        # Maps are taken before the downsampling, which no sequence of modules gives.
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **options | kwargs,
    )


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(name, pretrained, **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"timm's entry point of {name}; further arguments as `TimmInternImage`."
    return register_model(build)


MODELS = {
    name: _entry_point(name)
    for name in ("intern_image", *(f"intern_image_{size}" for size in INTERN_IMAGE_VARIANTS))
}
