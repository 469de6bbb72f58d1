"""A backbone as an ONNX graph of standard operators, compared with torch in onnxruntime.

DCNv3 becomes GridSample (opset 16 and later) and a weighted sum, by way of its reference in torch;
no custom operator, no plugin. The batch is dynamic, height and width are fixed.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from m3i_scale.models.backbone import Backbone

NEEDED = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # largest difference, relative to the largest absolute value or to 1
_LARGE = 1 << 30  # bytes of weights from which they stand beside the graph: protobuf ends at 2 GiB


class _Encoder(nn.Module):
    """Images (B, 3, H, W) to tokens (B, N, D) and, if trained, the pooled vector (B, E)."""

    def __init__(self, backbone: Backbone, pooling: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        tokens = self.backbone.features(images)
        return (tokens, self.backbone.pool(tokens)) if self.pooling else (tokens,)


def require_onnx() -> None:
    """Raise ValueError unless ONNX files can be written and checked."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--format onnx needs {', '.join(missing)}, which is not installed: "
            "pip install 'm3i-scale[onnx]'"
        )


def write_onnx(backbone: Backbone, path: Path, image_size: int, *, pooling: bool) -> float:
    """Write a backbone in float32, and compare it with torch on two random images.

    The graph maps `images` (B, 3, S, S), normalised, to `tokens` (B, N, D) and `pooled` (B, E).

    Args:
        backbone: on the CPU, in evaluation mode.
        path: the file to write. Large weights are written beside it.
        image_size: S.
        pooling: whether `pooled` is an output.

    Returns:
        The largest difference from torch, relative to the largest absolute value or to 1.

    Raises:
        ValueError: a package is missing, or the graph differs from torch by more than 1e-4.
    """
    require_onnx()
    model = _Encoder(backbone, pooling).eval()
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    _save(model, path, images)
    difference = _difference(model, path, images)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the ONNX graph differs from torch by {difference:.1e} of the largest value, more "
            f"than {TOLERANCE:.0e}; nothing was written. Please report this with the "
            "configuration of the run"
        )
    return difference


def _save(model: _Encoder, path: Path, images: Tensor) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own internals
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            input_names=["images"],
            output_names=["tokens", "pooled"][: 1 + model.pooling],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    assert program is not None
    weights = sum(parameter.nbytes for parameter in model.parameters())
    program.save(path, external_data=weights > _LARGE)


def _difference(model: nn.Module, path: Path, images: Tensor) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in (images, images[:1]):  # the batch is dynamic
        with torch.no_grad():
            expected = model(batch)
        found = session.run(None, {"images": batch.numpy()})
        for ours, theirs in zip(expected, found, strict=True):
            error = (ours - torch.from_numpy(theirs)).abs().max() / ours.abs().max().clamp(min=1)
            worst = max(worst, error.nan_to_num(torch.inf).item())
    return worst
