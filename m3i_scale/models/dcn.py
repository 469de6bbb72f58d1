"""The deformable convolution layer of InternImage: DCNv3 with its projections.

    y_g(p0) = sum_k m_gk(p0) x_g(p0 + s (p_k + dp_gk(p0)))            (arXiv 2211.05778, Eq. 2)

The sum, the softmax of the weights m and the blend with the undeformed value are
`m3i_kernels.dcnv3`; here live the layers that predict offsets, weights and blend.
"""

from typing import cast

import torch
from m3i_kernels import dcnv3, depthwise_norm_gelu
from torch import Tensor, nn
from torch.nn import functional as F

from m3i_scale.models.layers import (
    ToChannelsLast,
    XavierLinear,
    ZeroLinear,
    layer_norm,
    require_divisible,
)


class DCNv3(nn.Module):
    """Deformable convolution, stride 1, (N, H, W, C) -> (N, H, W, C).

    `fused_offset_branch` computes depthwise convolution, LayerNorm and GELU by
    `m3i_kernels.depthwise_norm_gelu` instead of torch's layers: the same parameters and function.
    `half_blend` is that of `m3i_kernels.dcnv3`: fewer instructions, less exact.
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        *,
        kernel_size: int = 3,
        dw_kernel_size: int | None = None,
        offset_scale: float = 1.0,
        remove_center: bool = False,
        center_feature_scale: bool = False,
        fused_offset_branch: bool = False,
        half_blend: bool = False,
    ) -> None:
        super().__init__()
        require_divisible("channels", channels, "groups", groups)
        dw_kernel_size = dw_kernel_size or kernel_size
        if kernel_size % 2 == 0 or dw_kernel_size % 2 == 0:
            raise ValueError(f"kernel sizes {kernel_size}, {dw_kernel_size}: must be odd")
        self.groups = groups
        self.kernel_size = kernel_size
        self.offset_scale = offset_scale
        self.remove_center = remove_center
        self.center_feature_scale = center_feature_scale
        self.fused_offset_branch = fused_offset_branch
        self.half_blend = half_blend
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.empty(groups, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.empty(groups))
            self.reset_parameters()
        points = groups * (kernel_size**2 - int(remove_center))
        self.dw_conv = nn.Sequential(
            nn.Conv2d(
                channels, channels, dw_kernel_size, padding=dw_kernel_size // 2, groups=channels
            ),
            nn.Sequential(ToChannelsLast(), layer_norm(channels)),
            nn.GELU(),
        )
        self.offset = ZeroLinear(channels, points * 2)
        self.mask = ZeroLinear(channels, points)
        self.input_proj = XavierLinear(channels, channels)
        self.output_proj = XavierLinear(channels, channels)

    def __prepare_scriptable__(self) -> nn.Module:
        """What TorchScript asks for; RuntimeError says what to do."""
        raise RuntimeError(
            "InternImage cannot be scripted: its operator takes keyword-only arguments, which "
            "TorchScript does not have; use torch.compile, torch.export or ONNX"
        )

    def reset_parameters(self) -> None:
        """Set the gates of the centre to one half; the layers inside reset their own weights."""
        if self.center_feature_scale:
            nn.init.zeros_(self.center_feature_scale_proj_weight)
            nn.init.zeros_(self.center_feature_scale_proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (N, H, W, C)."""
        value = self.input_proj(x)
        branch = self._offset_branch(x)
        y = dcnv3(
            value,
            self.offset(branch),
            self.mask(branch),
            kernel_size=self.kernel_size,
            padding=self.kernel_size // 2,
            groups=self.groups,
            offset_scale=self.offset_scale,
            remove_center=self.remove_center,
            mask_is_logits=True,
            center_scale=self._center_scale(branch),
            half_blend=self.half_blend,
        )
        return self.output_proj(y)

    def _offset_branch(self, x: Tensor) -> Tensor:
        """Map x (N, H, W, C) to the features that predict offsets, weights and blend."""
        if not self.fused_offset_branch:
            return self.dw_conv(x.permute(0, 3, 1, 2))
        get = self.dw_conv.get_parameter
        norm = cast(nn.LayerNorm, self.dw_conv.get_submodule("1.1"))
        affine = norm.weight, norm.bias
        return depthwise_norm_gelu(x, get("0.weight"), get("0.bias"), *affine, eps=norm.eps)

    def _center_scale(self, branch: Tensor) -> Tensor | None:
        if not self.center_feature_scale:
            return None
        weight = self.center_feature_scale_proj_weight
        bias = self.center_feature_scale_proj_bias
        return F.linear(branch, weight, bias).sigmoid()  # (N, H, W, G)
