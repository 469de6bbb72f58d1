"""Semantic segmentation: UperNet and Mask2Former on a backbone of `m3i_scale.models`."""
