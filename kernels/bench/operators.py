"""The registry of benchmarked operators: shapes, inputs, implementations, and the bytes they need.

An operator is a class with a name, a list of problems, and for each problem its inputs and
implementations. Everything else (checking, timing, reports) is the same for all of them.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import external
import m3i_kernels
import torch
import torch.nn.functional as F
from m3i_kernels import PhotometricParams, block_mix, dcnv3, photometric
from torch import Tensor

Implementation = Callable[..., Tensor | tuple[Tensor, ...]]

# name: channels, groups, whether the centre-feature-scale is there
VARIANTS = {"T": (64, 4, False), "B": (112, 7, False), "H": (320, 10, True), "G": (512, 16, True)}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Problem(NamedTuple):
    """One shape to measure; `shape` holds what the operator's `inputs` needs."""

    name: str
    dtype: torch.dtype
    shape: dict[str, Any]


class Operator(Protocol):
    """What the benchmark asks of an operator."""

    name: str
    directions: tuple[str, ...]

    def problems(self, batch: int, dtype: torch.dtype) -> Iterator[Problem]:
        """List the shapes, for `batch` images."""

    def inputs(self, problem: Problem, batch: int, device: str) -> dict[str, Tensor]:
        """Draw inputs; those that require a gradient say so."""

    def implementations(self, problem: Problem) -> dict[str, Implementation]:
        """Map names to functions of the inputs; the first is the one that is shipped."""

    def reference(self, problem: Problem) -> Implementation:
        """Return the function that the others are checked against, for float64 inputs."""

    def minimal_bytes(self, inputs: dict[str, Tensor], outputs: int, direction: str) -> int:
        """Count each input read once and each result written once."""

    def tolerance(self, dtype: torch.dtype) -> float:
        """Largest relative error in the norm that passes the check."""


class Dcnv3:
    """DCNv3 as InternImage calls it: logits and, in H and G, the centre-feature-scale fused."""

    name = "dcnv3"
    directions: tuple[str, ...] = ("forward", "backward", "both")
    plain = False

    def problems(self, batch: int, dtype: torch.dtype) -> Iterator[Problem]:
        """All four stages of T, B, H and G at 192 and 224 pixels."""
        for variant, (channels, groups, gated) in VARIANTS.items():
            for resolution in (192, 224):
                for stage in range(4):
                    shape = {
                        "size": resolution // 4 >> stage,
                        "channels": channels << stage,
                        "groups": groups << stage,
                        "gated": gated and not self.plain,
                    }
                    name = f"{variant} {resolution} stage {stage + 1}"
                    yield Problem(name, dtype, shape)

    def inputs(self, problem: Problem, batch: int, device: str) -> dict[str, Tensor]:
        """Normal values, offsets of about a pixel; none whole, where gradients are one-sided."""
        s, C, G = (problem.shape[k] for k in ("size", "channels", "groups"))
        shapes = {
            "x": (batch, s, s, C),
            "offset": (batch, s, s, G * 9 * 2),
            "mask": (batch, s, s, G * 9),
        }
        if problem.shape["gated"]:
            shapes["center_scale"] = (batch, s, s, G)
        inputs = {
            k: torch.randn(shape, device=device, dtype=problem.dtype) for k, shape in shapes.items()
        }
        if self.plain:
            inputs["mask"] = inputs["mask"].unflatten(-1, (G, 9)).softmax(-1).flatten(-2)
        inputs["offset"] += 0.25 * (inputs["offset"] == inputs["offset"].round())
        if "center_scale" in inputs:
            inputs["center_scale"] = inputs["center_scale"].sigmoid()
        return {k: v.requires_grad_() for k, v in inputs.items()}

    def _call(self, problem: Problem, backend: str, **options: Any) -> Implementation:
        def call(**inputs: Any) -> Tensor:
            return dcnv3(
                **inputs,
                kernel_size=3,
                padding=1,
                groups=problem.shape["groups"],
                mask_is_logits=not self.plain,
                backend=backend,
                **({"deterministic": False} | options),
            )

        return call

    def implementations(self, problem: Problem) -> dict[str, Implementation]:
        """Ours in three ways, eager and compiled reference; in float16 the official ones."""
        reference = self._call(problem, "reference")
        official = {}
        if problem.dtype == torch.float16:
            official = external.dcn_operators(problem.shape["groups"], not self.plain)
        return {
            "triton": self._call(problem, "triton"),
            "triton deterministic": self._call(problem, "triton", deterministic=True),
            "triton half_blend": self._call(problem, "triton", half_blend=True, algorithm="gather"),
            "reference eager": reference,
            "reference compiled": torch.compile(reference),
            **official,
        }

    def reference(self, problem: Problem) -> Implementation:
        """Return the pure-torch operator."""
        return self._call(problem, "reference")

    def minimal_bytes(self, inputs: dict[str, Tensor], outputs: int, direction: str) -> int:
        """Backward: gradient and inputs read, one gradient per input written, y for the softmax."""
        read = sum(t.nbytes for t in inputs.values())
        backward = 2 * read + outputs * (1 if self.plain else 2)
        return {"forward": read + outputs, "backward": backward}.get(
            direction, read + outputs + backward
        )

    def tolerance(self, dtype: torch.dtype) -> float:
        """As in the tests; in float32 the rounding of locations on larger images besides."""
        return {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]


class Dcnv3Plain(Dcnv3):
    """The operator alone: weights given, no blend; what the official extensions compute."""

    name = "dcnv3_plain"
    plain = True


class Depthwise:
    """Depthwise 5 x 5, LayerNorm and GELU, channels last: the offset branch of InternImage-H."""

    name = "depthwise"
    directions: tuple[str, ...] = ("forward", "backward", "both")

    def problems(self, batch: int, dtype: torch.dtype) -> Iterator[Problem]:
        """All four stages of H at 192 and 224 pixels."""
        for resolution in (192, 224):
            for stage in range(4):
                shape = {"size": resolution // 4 >> stage, "channels": 320 << stage}
                yield Problem(f"H {resolution} stage {stage + 1}", dtype, shape)

    def inputs(self, problem: Problem, batch: int, device: str) -> dict[str, Tensor]:
        """Normal values; weights so that the convolution's result is of order 1."""
        s, C = problem.shape["size"], problem.shape["channels"]
        shapes = {
            "x": (batch, s, s, C),
            "weight": (C, 1, 5, 5),
            "bias": (C,),
            "norm_weight": (C,),
            "norm_bias": (C,),
        }
        inputs = {
            k: torch.randn(shape, device=device, dtype=problem.dtype) for k, shape in shapes.items()
        }
        inputs["weight"] /= 5
        return {k: v.requires_grad_() for k, v in inputs.items()}

    def implementations(self, problem: Problem) -> dict[str, Implementation]:
        """Ours, and torch's three layers as the model calls them, eager and compiled."""

        def layers(
            x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor
        ) -> Tensor:
            z = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=2, groups=x.shape[-1])
            u = F.layer_norm(z.permute(0, 2, 3, 1), norm_bias.shape, norm_weight, norm_bias, 1e-6)
            return F.gelu(u)

        return {
            "triton": functools.partial(m3i_kernels.depthwise_norm_gelu, backend="triton"),
            "torch eager": layers,
            "torch compiled": torch.compile(layers),
        }

    def reference(self, problem: Problem) -> Implementation:
        """Return the pure-torch operator."""
        return functools.partial(m3i_kernels.depthwise_norm_gelu, backend="reference")

    def minimal_bytes(self, inputs: dict[str, Tensor], outputs: int, direction: str) -> int:
        """Forward: x read, the result written; backward: gradient and x read, one gradient written.

        What the steps in between keep (the convolution's result) is not necessary, and not counted.
        """
        read = sum(t.nbytes for t in inputs.values())
        backward = 2 * read + outputs
        return {"forward": read + outputs, "backward": backward}.get(
            direction, read + outputs + backward
        )

    def tolerance(self, dtype: torch.dtype) -> float:
        """The rounding of the result and of the convolution's result before it."""
        return {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2.5e-2}[dtype]


class BlockMix:
    """Two uint8 view batches to normalised mixes and clean views."""

    name = "block_mix"
    directions: tuple[str, ...] = ("forward",)

    def problems(self, batch: int, dtype: torch.dtype) -> Iterator[Problem]:
        """192 and 224 pixels, patches of 16, channels-last and contiguous."""
        for size in (192, 224):
            for layout in ("channels_last", "contiguous"):
                yield Problem(f"{size} {layout}", dtype, {"size": size, "layout": layout})

    def inputs(self, problem: Problem, batch: int, device: str) -> dict[str, Tensor]:
        """Random images; half of the patches are seen."""
        s = problem.shape["size"]
        views = torch.randint(0, 256, (2, batch, s, s, 3), device=device, dtype=torch.uint8)
        return {
            "view_a": views[0],
            "view_b": views[1],
            "partner": torch.arange(batch, device=device) ^ 1,
            "mask": torch.rand((batch, s // 16, s // 16), device=device) < 0.5,
        }

    def _call(self, problem: Problem, backend: str, dtype: torch.dtype) -> Implementation:
        def call(**inputs: Tensor) -> tuple[Tensor, ...]:
            mixed = block_mix(
                **inputs,
                patch_size=16,
                mean=MEAN,
                std=STD,
                dtype=dtype,
                memory_format=problem.shape["layout"],
                backend=backend,
            )
            return tuple(t for t in mixed if t is not None)

        return call

    def implementations(self, problem: Problem) -> dict[str, Implementation]:
        """Ours, eager and compiled reference."""
        reference = self._call(problem, "reference", problem.dtype)
        return {
            "triton": self._call(problem, "triton", problem.dtype),
            "reference eager": reference,
            "reference compiled": torch.compile(reference),
        }

    def reference(self, problem: Problem) -> Implementation:
        """Return the pure-torch operator in float64."""
        return self._call(problem, "reference", torch.float64)

    def minimal_bytes(self, inputs: dict[str, Tensor], outputs: int, direction: str) -> int:
        """Each view read once: the other image of a pair is in the same batch."""
        return sum(t.nbytes for t in inputs.values()) + outputs

    def tolerance(self, dtype: torch.dtype) -> float:
        """Rounding of the result alone."""
        return {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]


class Photometric:
    """The whole augmentation with the usual probabilities, fused with normalisation."""

    name = "photometric"
    directions: tuple[str, ...] = ("forward",)

    def problems(self, batch: int, dtype: torch.dtype) -> Iterator[Problem]:
        """192 and 224 pixels; blur on no, half or every sample."""
        for size in (192, 224):
            for blurred in (0.0, 0.5, 1.0):
                shape = {"size": size, "blurred": blurred}
                yield Problem(f"{size} blur {blurred:.0%}", dtype, shape)

    def inputs(self, problem: Problem, batch: int, device: str) -> dict[str, Tensor]:
        """Random images, and parameters one by one as keywords."""
        s = problem.shape["size"]

        def uniform(low: float, high: float) -> Tensor:
            return torch.rand(batch, device=device) * (high - low) + low

        def sometimes(p: float, value: Tensor, off: float) -> Tensor:
            return torch.where(uniform(0, 1) < p, value, off)

        return {
            "images": torch.randint(0, 256, (batch, s, s, 3), device=device, dtype=torch.uint8),
            "brightness": sometimes(0.8, uniform(0.6, 1.4), 1),
            "contrast": sometimes(0.8, uniform(0.6, 1.4), 1),
            "saturation": sometimes(0.8, uniform(0.8, 1.2), 1),
            "hue": sometimes(0.8, uniform(-0.1, 0.1), 0),
            "order": torch.rand((batch, 4), device=device).argsort(1),
            "grayscale": uniform(0, 1) < 0.2,
            "blur_sigma": sometimes(problem.shape["blurred"], uniform(0.1, 2.0), 0),
            "solarize": sometimes(0.2, uniform(128, 128), 256),
        }

    def _call(self, backend: str, dtype: torch.dtype) -> Implementation:
        def call(images: Tensor, **rows: Tensor) -> Tensor:
            params = PhotometricParams(**rows)
            return photometric(images, params, mean=MEAN, std=STD, dtype=dtype, backend=backend)

        return call

    def implementations(self, problem: Problem) -> dict[str, Implementation]:
        """Ours and the eager reference."""
        return {
            "triton": self._call("triton", problem.dtype),
            "reference eager": self._call("reference", problem.dtype),
        }

    def reference(self, problem: Problem) -> Implementation:
        """Return the pure-torch operator; grey levels are whole numbers in any precision."""
        return self._call("reference", torch.float32)

    def minimal_bytes(self, inputs: dict[str, Tensor], outputs: int, direction: str) -> int:
        """Images read once, results written once."""
        return sum(t.nbytes for t in inputs.values()) + outputs

    def tolerance(self, dtype: torch.dtype) -> float:
        """A grey level here and there, and the rounding of the result."""
        return 4e-3


OPERATORS: dict[str, Operator] = {
    op.name: op for op in (Dcnv3(), Dcnv3Plain(), Depthwise(), BlockMix(), Photometric())
}
