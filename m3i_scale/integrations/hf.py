"""InternImage for transformers. Importing this module registers it with the Auto classes.

    import m3i_scale.integrations.hf
    model = AutoModelForImageClassification.from_pretrained("OpenGVLab/internimage_t_1k_224")

Published folders load without their remote code, and saved ones have the published names: each
tensor begins with `model.`, and the layer scale is `layer_scale1`, `layer_scale2`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    CLIPImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)

from m3i_scale.models.intern_image import InternImage, Stage

# What published configurations may say and `InternImage` does in one way only.
_FIXED = {
    "core_op": ("DCNv3", "DCNv3_pytorch"),
    "act_layer": ("GELU",),
    "norm_layer": ("LN",),
    "cls_scale": (1.5,),
    "drop_rate": (0.0,),
}
# Arguments of `InternImage` that say how it computes, not what; `with_cp` has the published name.
_RUNTIME = {"checkpoint_blocks", "fused_offset_branch", "half_blend"}
OPTIONS = tuple(
    name
    for name in inspect.signature(InternImage).parameters
    if name not in _RUNTIME | {"num_classes"}
)
STAGES = ["stem", "stage1", "stage2", "stage3", "stage4"]


class InternImageConfig(BackboneConfigMixin, PreTrainedConfig):
    """Options of `InternImage` under their own names, which are the published ones.

    Defaults are those of published folders, which leave them out: the sizes of InternImage-T.

    Raises ValueError for options that `InternImage` does not have.
    """

    model_type = "internimage"
    attribute_map = {"num_classes": "num_labels"}  # noqa: RUF012  (transformers' way)

    channels: int = 64
    depths: list[int] | tuple[int, ...] = (4, 4, 18, 4)
    groups: list[int] | tuple[int, ...] = (4, 8, 16, 32)
    mlp_ratio: float = 4.0
    offset_scale: float = 1.0
    layer_scale: float | None = None
    post_norm: bool = False
    res_post_norm: bool = False
    dw_kernel_size: int | None = None
    remove_center: bool = False
    center_feature_scale: bool = False
    level2_post_norm: bool = False
    level2_post_norm_block_ids: list[int] | tuple[int, ...] | None = None
    use_clip_projector: bool = False
    clip_projector_width: int = 1024
    clip_heads: int = 16
    clip_embed_dim: int = 768
    drop_path_rate: float = 0.0
    drop_path_type: str = "linear"
    with_cp: bool = False
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Called by the constructor with all further options."""
        for name, known in _FIXED.items():
            if kwargs.get(name, known[0]) not in known:
                raise ValueError(
                    f"{name}={kwargs[name]!r} in the configuration of an InternImage: this "
                    f"implementation has {known[0]!r} only"
                )
        self.stage_names = STAGES
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None),
            out_indices=kwargs.pop("out_indices", None),
        )
        classes = kwargs.pop("num_classes", 1000)
        if self.id2label is None:
            kwargs.setdefault("num_labels", classes)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As transformers', which leaves out two labels, its default."""
        return super().to_dict() | {"num_classes": self.num_labels}

    def options(self) -> dict[str, Any]:
        """Arguments of `InternImage`, without `num_classes`."""
        options = {name: getattr(self, name) for name in OPTIONS}
        return options | {"checkpoint_blocks": self.with_cp}


class InternImagePreTrainedModel(PreTrainedModel):
    """What the three models share: initialisation, checkpointing, safe loading."""

    config_class = InternImageConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (transformers' way)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but pickles are refused whatever is asked for.

        Raises:
            ValueError: `weights_only=False`.
        """
        if not kwargs.get("weights_only", True):
            raise ValueError(
                "weights_only=False would execute what a file says; convert it to safetensors"
            )
        return super().from_pretrained(*args, **kwargs)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass."""
        return any(stage.checkpoint_blocks for stage in self._stages())

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        for stage in self._stages():
            stage.checkpoint_blocks = enable

    def _encode(self, pixel_values: Tensor) -> list[Tensor]:
        """Maps (B, H, W, .) of the stem and the stages; refuses sizes that the fused map lacks."""
        if self.config.use_clip_projector:
            self.model.grid_size(*pixel_values.shape[-2:])
        return self.model.forward_maps(pixel_values)

    def _stages(self) -> list[Stage]:
        return [module for module in self.modules() if isinstance(module, Stage)]

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        function = gradient_checkpointing_func
        if isinstance(function, functools.partial):
            function = function.func
        if every_n_layers != 1 or function is not checkpoint:
            raise ValueError("InternImage recomputes every block, without offloading its input")
        self.gradient_checkpointing = enable

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the constructor draws them; what a file has set stays."""
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        loaded = [tensor for tensor in own if getattr(tensor, "_is_hf_initialized", False)]
        if len(loaded) == len(own):
            return
        kept = [tensor.clone() for tensor in loaded]
        module.reset_parameters()  # type: ignore[operator]
        for tensor, value in zip(loaded, kept, strict=True):
            tensor.copy_(value)


def _channels_first(maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.permute(0, 3, 1, 2).contiguous() for x in maps)


# Tensors of a classifier, and of the fused map with its pooling.
_CLASSIFIER = [r"^model\.conv_head\.", r"^model\.head\.", r"^model\.fc_norm\."]
_FUSED = [r"^model\.dcnv3_head_x[34]\.", r"^model\.clip_projector\."]


class InternImageModel(InternImagePreTrainedModel):
    """InternImage without a classifier.

    Of `pixel_values` (B, 3, H, W), normalised, it gives
        last_hidden_state   the last stage's map (B, 8C, H/32, W/32); with `use_clip_projector` the
                            fused map (B, 1024, H/16, W/16), on which M3I trains
        pooler_output       its mean (B, 8C), or the attention pooling of the fused map (B, 768)
        hidden_states       if asked for: maps (B, ., ., .) of the stem and the four stages
    """

    _keys_to_ignore_on_load_unexpected = _CLASSIFIER

    def __init__(self, config: InternImageConfig) -> None:
        super().__init__(config)
        self.model = InternImage(**config.options(), num_classes=0)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> Any:
        """Encode images."""
        maps = self._encode(pixel_values)
        if self.config.use_clip_projector:
            last = self.model.fuse(*maps[-2:])
            pooled = self.model.pool(last.flatten(2).transpose(1, 2))
        else:
            last = maps[-1].permute(0, 3, 1, 2).contiguous()
            pooled = last.mean((2, 3))
        outputs = BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=last,
            pooler_output=pooled,
            hidden_states=_wanted(self.config, output_hidden_states, maps),
        )
        return _returned(self.config, return_dict, outputs)


class InternImageForImageClassification(InternImagePreTrainedModel):
    """InternImage with its classifier; `labels` give a loss."""

    accepts_loss_kwargs = False

    def __init__(self, config: InternImageConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        if not self.num_labels:
            raise ValueError("num_labels=0: a classifier needs one label or more")
        self.model = InternImage(**config.options(), num_classes=config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> Any:
        """Classify images (B, 3, H, W); `labels` are (B,) class numbers, as in transformers."""
        maps = self._encode(pixel_values)
        logits = self.model.head(self.model.embed(maps[1:]))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        outputs = ImageClassifierOutputWithNoAttention(
            loss=loss,
            logits=logits,
            hidden_states=_wanted(self.config, output_hidden_states, maps),
        )
        return _returned(self.config, return_dict, outputs)


class InternImageBackbone(BackboneMixin, InternImagePreTrainedModel):
    """The maps of InternImage for detectors and segmenters; any image size.

    `out_features` or `out_indices` of the configuration choose among stem (stride 4) and stage1 to
    stage4 (strides 4 to 32).
    """

    has_attentions = False
    _keys_to_ignore_on_load_unexpected = [*_CLASSIFIER, *_FUSED]  # noqa: RUF012

    def __init__(self, config: InternImageConfig) -> None:
        super().__init__(config)
        self.num_features = [config.channels] + [config.channels * 2**i for i in range(4)]
        # A fused map that no loss reaches would be weights without a gradient.
        options = config.options() | {"use_clip_projector": False}
        self.model = InternImage(**options, num_classes=0)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> Any:
        """Encode images (B, 3, H, W)."""
        maps = self.model.forward_maps(pixel_values)
        named = dict(zip(self.stage_names, _channels_first(maps), strict=True))
        outputs = BackboneOutput(
            feature_maps=tuple(named[name] for name in self.out_features),
            hidden_states=_wanted(self.config, output_hidden_states, maps),
        )
        return _returned(self.config, return_dict, outputs)


def _wanted(
    config: InternImageConfig, asked: bool | None, maps: Sequence[Tensor]
) -> tuple[Tensor, ...] | None:
    asked = config.output_hidden_states if asked is None else asked
    return _channels_first(maps) if asked else None


def _returned(config: InternImageConfig, asked: bool | None, outputs: Any) -> Any:
    as_dict = config.return_dict if asked is None else asked
    return outputs if as_dict else outputs.to_tuple()


def register() -> None:
    """Register the classes; the import of this module has done it."""
    AutoConfig.register(InternImageConfig.model_type, InternImageConfig, exist_ok=True)
    for auto, model in (
        (AutoModel, InternImageModel),
        (AutoBackbone, InternImageBackbone),
        (AutoModelForImageClassification, InternImageForImageClassification),
    ):
        auto.register(InternImageConfig, model, exist_ok=True)
    AutoImageProcessor.register(
        InternImageConfig,
        image_processor_classes={"torchvision": CLIPImageProcessor},
        exist_ok=True,
    )
    renamed = [WeightRenaming(f"layer_scale{n}", f"gamma{n}") for n in (1, 2)]
    register_checkpoint_conversion_mapping(InternImageConfig.model_type, renamed, overwrite=True)


register()
