"""Tests of how the device computes."""

import torch

from m3i_scale.cluster.numerics import deterministic_inside

FUSED = (
    torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.cudnn_sdp_enabled,
)


def test_fused_attention_which_adds_in_any_order_is_off_where_operators_only_warn():
    before = [enabled() for enabled in FUSED]
    with deterministic_inside(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert not any(enabled() for enabled in FUSED)
    assert [enabled() for enabled in FUSED] == before
    assert not torch.are_deterministic_algorithms_enabled()
