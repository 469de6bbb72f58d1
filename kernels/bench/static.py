"""What the compiler says about every shipped kernel configuration, without a GPU."""

import concurrent.futures
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import compile_only
import roofline
import torch
from m3i_kernels import PhotometricParams
from m3i_kernels.dcnv3.geometry import make_geometry
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = "forward half_blend"
_DIRECTIONS = ("forward", _HALF, "backward", "backward deterministic")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# The packages export functions of the same name, so the modules are fetched by their full name.
dcnv3_op = importlib.import_module("m3i_kernels.dcnv3.op")
block_mix_op = importlib.import_module("m3i_kernels.block_mix.op")
depthwise_op = importlib.import_module("m3i_kernels.depthwise.op")
photometric_op = importlib.import_module("m3i_kernels.photometric.op")


class StaticCount(NamedTuple):
    """One kernel on one target; bytes are per element of the result.

    `per_result` is what a thread executes for one element of the result, loops as often as they
    run; nan where that is not counted (AMD's targets, operators on images).
    """

    operator: str
    configuration: str
    kernel: str
    target: str
    num_warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: int
    per_result: float
    requested_bytes: float
    minimal_bytes: float


class Configuration(NamedTuple):
    """One shipped configuration; `launches` records what it launches.

    requested_bytes counts every element that load, store and atomic instructions name, caches or
    not; minimal_bytes counts each input read once and each result written once.
    """

    operator: str
    name: str
    launches: Callable[[], list[compile_only.Launch]]
    requested_bytes: float
    minimal_bytes: float
    vendors: tuple[str, ...] = ("cuda", "hip")


def configurations() -> list[Configuration]:
    """List what the library launches for InternImage T to G and for M3I's batches."""
    return [*_dcnv3_configurations(), *_depthwise_configurations(), *_image_configurations()]


def report(
    chosen: Sequence[Configuration], targets: Sequence[str], processes: int = 2
) -> Iterator[StaticCount]:
    """Compile `chosen` for `targets` in parallel processes and yield rows in order."""
    jobs = [
        (c.operator, c.name, target)
        for c in chosen
        for target in targets
        if compile_only.TARGETS[target].backend in c.vendors
    ]
    with concurrent.futures.ProcessPoolExecutor(processes) as pool:
        for rows in pool.map(_compile, jobs):
            yield from rows


def problems(rows: Sequence[StaticCount]) -> list[str]:
    """Say which rows spill registers or do not fit the target's shared memory."""
    found = []
    for row in rows:
        where = f"{row.operator} {row.configuration} {row.kernel} on {row.target}"
        if row.spilled_bytes > 0:
            found.append(f"{where} spills {row.spilled_bytes} bytes")
        if row.shared_bytes > compile_only.SHARED_LIMIT[row.target]:
            found.append(f"{where} needs {row.shared_bytes} bytes of shared memory")
    return found


def _compile(job: tuple[str, str, str]) -> list[StaticCount]:
    operator, name, target = job
    chosen = next(c for c in configurations() if (c.operator, c.name) == (operator, name))
    rows = []
    for launch in chosen.launches():
        resources = compile_only.compile_launch(launch, target)
        rows.append(
            StaticCount(
                operator,
                name,
                launch.kernel.__name__,
                target,
                launch.options["num_warps"],
                *resources[:4],
                _per_result(launch, resources, target),
                round(chosen.requested_bytes, 2),
                round(chosen.minimal_bytes, 2),
            )
        )
    return rows


def _per_result(
    launch: compile_only.Launch, resources: compile_only.Resources, target: str
) -> float:
    described = launch.kernel.__name__ in roofline.DESCRIBED
    if not described or compile_only.TARGETS[target].backend != "cuda":
        return float("nan")
    return round(roofline.instructions_per_result(launch, resources), 1)


def _dcnv3_configurations() -> Iterator[Configuration]:
    """Groups of 16 channels (T to XL) and of 32 with the blend (H, G), in every precision."""
    for models, channels, groups, gated in (("T-XL", 16, 16, False), ("H G", 32, 40, True)):
        for precision, dtype in DTYPES.items():
            for direction in _DIRECTIONS:
                if direction == _HALF and dtype == torch.float32:
                    continue
                yield Configuration(
                    "dcnv3",
                    f"{models} {precision} {direction}",
                    functools.partial(_record_dcnv3, channels, groups, gated, dtype, direction),
                    *_dcnv3_bytes(channels, gated, dtype.itemsize, direction),
                    ("cuda",) if direction == _HALF else ("cuda", "hip"),
                )


def _dcnv3_bytes(channels: int, gated: bool, size: int, direction: str) -> tuple[float, float]:
    """Requested and minimal bytes per channel of one output position; K = 9 points."""
    K = 9
    row = (3 * K + gated) * size / channels  # offsets, logits and gate
    corners, logits_again = 4 * K * size, K * size / channels
    if direction in ("forward", _HALF):
        return corners + size * (1 + gated) + row + logits_again, 2 * size + row
    # atomics: one read and one write of the accumulator; then its conversion to the result
    accumulator = 8 if "deterministic" in direction else 4
    scattered = (4 * K + gated) * 2 * accumulator + 2 * accumulator + size
    read = corners + size * (2 + gated) + row + 2 * logits_again
    return read + scattered + row, 4 * size + 2 * row


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _record_dcnv3(
    channels: int, groups: int, gated: bool, dtype: torch.dtype, direction: str
) -> list[compile_only.Launch]:
    N, S, K = 64, 12, 9
    geometry = make_geometry(3, 1, 1, 1, groups, 1.0, False)
    x = _meta(N, S, S, groups * channels, dtype=dtype)
    offset = _meta(N, S, S, groups * K * 2, dtype=dtype)
    mask = _meta(N, S, S, groups * K, dtype=dtype)
    scale = _meta(N, S, S, groups, dtype=dtype) if gated else None
    tensors = (x, offset, mask, scale)
    with compile_only.record(dcnv3_op) as launches:
        fixed_point = direction == "backward deterministic"
        half, backward = direction == _HALF, direction.startswith("backward")
        tiles = dcnv3_op.choose_tiles(
            channels, K, backward, fixed_point, itemsize=dtype.itemsize, half=half
        )
        if not backward:
            dcnv3_op.launch_forward(tensors, x, geometry, True, tiles, half)
            return launches
        unit = _meta(1, dtype=torch.float32) if fixed_point else None
        dx = _meta(*x.shape, dtype=torch.int64 if fixed_point else torch.float32)
        gradients = (dx, offset, mask, x if scale is None else scale)
        dcnv3_op.launch_backward(x, x, tensors, unit, gradients, geometry, True, tiles)
    return launches


def _depthwise_configurations() -> Iterator[Configuration]:
    """5 x 5 at the widths of H's first and last stage, and of B's first."""
    for channels, size in ((320, 48), (2560, 6), (112, 48)):
        for precision, dtype in DTYPES.items():
            n = dtype.itemsize
            for direction, requested, minimal in (
                # a strip of 4 loads 8 columns a row; weights are float32; then z and y
                ("forward", 10 * n + 25 + n + 2 * n, 2 * n),
                ("backward", 3 * n + 10 * n + 25 + n + 5 * 3 * n, 3 * n),
            ):
                record = functools.partial(_record_depthwise, channels, size, dtype, direction)
                name = f"{channels} {precision} {direction}"
                yield Configuration("depthwise", name, record, requested, minimal)


def _record_depthwise(
    channels: int, size: int, dtype: torch.dtype, direction: str
) -> list[compile_only.Launch]:
    x = _meta(64, size, size, channels, dtype=dtype)
    row, taps = _meta(channels, dtype=dtype), _meta(25, channels, dtype=torch.float32)
    with compile_only.record(depthwise_op) as launches:
        if direction == "forward":
            depthwise_op.launch_conv(x, taps, row, x)
            depthwise_op.launch_norm(x, row, row, 1e-6, x)
            return launches
        depthwise_op.launch_norm_backward(x, x, row, row, 1e-6, x, _meta(8, 2, channels))
        depthwise_op.launch_conv(x, taps, None, x)
        depthwise_op.launch_weight(x, x, _meta(8, 26, channels), 5)
    return launches


def _image_configurations() -> Iterator[Configuration]:
    for precision, dtype in DTYPES.items():
        for layout in ("channels_last", "contiguous"):
            name = f"{precision} {layout}"
            written = dtype.itemsize
            # per element of the mix: a, b, and the other image where n itself is not seen
            yield Configuration(
                "block_mix",
                name,
                functools.partial(_record_block_mix, dtype, layout),
                3 + 3 * written,
                2 + 3 * written,
            )
            blurred = 2 + 1 + 19 + 4 + 19 * 4 + written
            record = functools.partial(_record_photometric, dtype, layout)
            yield Configuration("photometric", name, record, blurred, 1 + written)
    yield Configuration("photometric", "uint8", _record_photometric, 2 + 1 + 19 + 4 + 19 * 4 + 1, 2)


def _record_block_mix(dtype: torch.dtype, layout: str) -> list[compile_only.Launch]:
    images = _meta(256, 192, 192, 3, dtype=torch.uint8)
    partner = _meta(256, dtype=torch.int64)
    seen = _meta(256, 12, 12, dtype=torch.bool)
    with compile_only.record(block_mix_op) as launches:
        block_mix_op.block_mix_triton(
            images, images, partner, seen, 16, MEAN, STD, dtype, _memory_format(layout)
        )
    return launches


def _record_photometric(
    dtype: torch.dtype | None = None, layout: str = "channels_last"
) -> list[compile_only.Launch]:
    images = _meta(256, 192, 192, 3, dtype=torch.uint8)
    row = _meta(256, dtype=torch.float32)
    order = _meta(256, 4, dtype=torch.int64)
    params = PhotometricParams(row, row, row, row, order, row.bool(), row, row)
    statistics = (None, None) if dtype is None else (MEAN, STD)
    with compile_only.record(photometric_op) as launches:
        photometric_op.photometric_triton(
            images, params, 19, *statistics, dtype or torch.float32, _memory_format(layout)
        )
    return launches


def _memory_format(layout: str) -> torch.memory_format:
    return {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}[layout]
