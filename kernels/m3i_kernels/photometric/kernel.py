# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Triton kernels of the photometric augmentation, in up to four passes over the pixels.

1. `grey_sum_kernel`: sum of the grey image as the contrast operation of each sample meets it.
2. `jitter_kernel`: jitter and grayscale; finishes the samples that are not blurred.
3. `blur_rows_kernel`, 4. `blur_columns_kernel`: the blurred samples only, which are finished then.

Finishing is solarising and, if asked for, `(x / 255 - mean) / std`. A program owns BLOCK
neighbouring pixels of one image. Like torchvision, every operation ends on 8-bit levels, which are
kept as float32. Floating-point contraction is off: a fused multiply-add would move values across
the boundaries of levels. Prefixes: p_ pointer, o_ offset in elements, i_ index.
"""

import triton
import triton.language as tl


@triton.jit
def _grey(r, g, b):
    return tl.floor(0.2989 * r + 0.587 * g + 0.114 * b)


@triton.jit
def _blend(x, other, ratio):
    y = ratio * x + (1 - ratio) * other
    return tl.floor(tl.minimum(tl.maximum(y, 0.0), 255.0))


@triton.jit
def _hue_channel(value, chroma, sextant, n):
    """Channel of a colour whose hue is `sextant` / 6: `value - chroma * clamp(min(k, 4 - k))`."""
    k = sextant + n
    k -= 6 * tl.floor(k / 6)
    weight = tl.minimum(tl.maximum(tl.minimum(k, 4 - k), 0.0), 1.0)
    return tl.floor((value - chroma * weight) * (255.999 / 255))


@triton.jit
def _hue(r, g, b, shift):
    value = tl.maximum(tl.maximum(r, g), b)
    chroma = value - tl.minimum(tl.minimum(r, g), b)
    divisor = tl.where(chroma == 0, 1.0, chroma)
    from_green = tl.where(value == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor)
    sextant = tl.where(value == r, (g - b) / divisor, from_green) + 6 * shift
    return (
        _hue_channel(value, chroma, sextant, 5.0),
        _hue_channel(value, chroma, sextant, 3.0),
        _hue_channel(value, chroma, sextant, 1.0),
    )


@triton.jit
def _jitter_step(r, g, b, operation, mean, brightness, contrast, saturation, hue):
    """Apply one of the four operations; the identity is skipped, as it need not be exact."""
    if operation == 0 and brightness != 1:
        r, g, b = _blend(r, 0.0, brightness), _blend(g, 0.0, brightness), _blend(b, 0.0, brightness)
    if operation == 1 and contrast != 1:
        r, g, b = _blend(r, mean, contrast), _blend(g, mean, contrast), _blend(b, mean, contrast)
    if operation == 2 and saturation != 1:
        grey = _grey(r, g, b)
        r, g, b = (
            _blend(r, grey, saturation),
            _blend(g, grey, saturation),
            _blend(b, grey, saturation),
        )
    if operation == 3 and hue != 0:
        r, g, b = _hue(r, g, b, hue)
    return r, g, b


@triton.jit
def _load_pixels(p, i_pixel, inside):
    r = tl.load(p + 3 * i_pixel, mask=inside, other=0).to(tl.float32)
    g = tl.load(p + 3 * i_pixel + 1, mask=inside, other=0).to(tl.float32)
    b = tl.load(p + 3 * i_pixel + 2, mask=inside, other=0).to(tl.float32)
    return r, g, b


@triton.jit
def _store_channel(
    p_out, i_pixel, c: tl.constexpr, level, scale, shift, inside, pixels,
    NORMALISE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    if NORMALISE:
        level = level * scale + shift
    o = 3 * i_pixel + c if CHANNELS_LAST else c * pixels + i_pixel
    tl.store(p_out + o, level.to(p_out.dtype.element_ty), mask=inside)


@triton.jit
def _finish(
    p_out, i_pixel, r, g, b, threshold, inside, pixels,
    scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    NORMALISE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Solarise, normalise and store the pixels of one image."""
    r = tl.where(r >= threshold, 255 - r, r)
    g = tl.where(g >= threshold, 255 - g, g)
    b = tl.where(b >= threshold, 255 - b, b)
    _store_channel(p_out, i_pixel, 0, r, scale_r, shift_r, inside, pixels, NORMALISE, CHANNELS_LAST)
    _store_channel(p_out, i_pixel, 1, g, scale_g, shift_g, inside, pixels, NORMALISE, CHANNELS_LAST)
    _store_channel(p_out, i_pixel, 2, b, scale_b, shift_b, inside, pixels, NORMALISE, CHANNELS_LAST)


@triton.jit
def _pixels(pixels, BLOCK: tl.constexpr):
    """Locate the pixels of this program: (image int64, tile, pixel, inside)."""
    tiles = (pixels + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    i_pixel = pid % tiles * BLOCK + tl.arange(0, BLOCK)
    return (pid // tiles).to(tl.int64), pid % tiles, i_pixel, i_pixel < pixels


@triton.jit
def grey_sum_kernel(
    p_images, p_sums, p_brightness, p_contrast, p_saturation, p_hue, p_order, pixels,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the sum of grey levels of each tile, int32 (B, tiles), where the contrast step is."""
    i_n, i_tile, i_pixel, inside = _pixels(pixels, BLOCK)
    contrast = tl.load(p_contrast + i_n)
    if contrast != 1:
        brightness = tl.load(p_brightness + i_n)
        saturation = tl.load(p_saturation + i_n)
        hue = tl.load(p_hue + i_n)
        r, g, b = _load_pixels(p_images + i_n * pixels * 3, i_pixel, inside)
        reached = 0
        for step in range(4):
            operation = tl.load(p_order + i_n * 4 + step)
            reached += tl.where(operation == 1, 1, 0)
            if reached == 0:
                r, g, b = _jitter_step(r, g, b, operation, 0.0, brightness, 1.0, saturation, hue)
        total = tl.sum(tl.where(inside, _grey(r, g, b), 0.0).to(tl.int32))
        tl.store(p_sums + i_n * ((pixels + BLOCK - 1) // BLOCK) + i_tile, total)


@triton.jit
def jitter_kernel(
    p_images, p_sums, p_brightness, p_contrast, p_saturation, p_hue, p_order,
    p_grayscale, p_sigma, p_solarize, p_levels, p_out, pixels,
    scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    NORMALISE: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Write the results of samples without blur, and uint8 `p_levels` of those with it."""
    i_n, _, i_pixel, inside = _pixels(pixels, BLOCK)
    brightness = tl.load(p_brightness + i_n)
    contrast = tl.load(p_contrast + i_n)
    saturation = tl.load(p_saturation + i_n)
    hue = tl.load(p_hue + i_n)
    mean = 0.0
    if contrast != 1:
        tiles = (pixels + BLOCK - 1) // BLOCK
        i_tile = tl.arange(0, BLOCK_TILES)
        sums = tl.load(p_sums + i_n * tiles + i_tile, mask=i_tile < tiles, other=0)
        mean = (tl.sum(sums.to(tl.int64)).to(tl.float64) / pixels).to(tl.float32)
    r, g, b = _load_pixels(p_images + i_n * pixels * 3, i_pixel, inside)
    for step in range(4):
        operation = tl.load(p_order + i_n * 4 + step)
        r, g, b = _jitter_step(r, g, b, operation, mean, brightness, contrast, saturation, hue)
    if tl.load(p_grayscale + i_n) != 0:
        r = _grey(r, g, b)
        g = r
        b = r
    if tl.load(p_sigma + i_n) > 0:
        p = p_levels + i_n * pixels * 3 + 3 * i_pixel
        tl.store(p, r.to(tl.uint8), mask=inside)
        tl.store(p + 1, g.to(tl.uint8), mask=inside)
        tl.store(p + 2, b.to(tl.uint8), mask=inside)
    else:
        _finish(
            p_out + i_n * pixels * 3, i_pixel, r, g, b, tl.load(p_solarize + i_n), inside, pixels,
            scale_r, scale_g, scale_b, shift_r, shift_g, shift_b, NORMALISE, CHANNELS_LAST,
        )  # fmt: skip


@triton.jit
def _tap(i, sigma):
    distance = i / sigma
    return tl.exp(-0.5 * (distance * distance))


@triton.jit
def _blur_line(p, i_pixel, position, length, step, sigma, inside, TAPS: tl.constexpr):
    """Blur along an axis, reflected at the borders: `position` of `length`, pixels `step` apart."""
    HALF: tl.constexpr = TAPS // 2
    norm = 0.0
    for i in range(TAPS):
        norm += _tap(i - HALF, sigma)
    r = tl.zeros(i_pixel.shape, tl.float32)
    g = tl.zeros(i_pixel.shape, tl.float32)
    b = tl.zeros(i_pixel.shape, tl.float32)
    for i in range(TAPS):
        at = tl.abs(position + (i - HALF))
        at = tl.where(at >= length, 2 * length - 2 - at, at)
        weight = _tap(i - HALF, sigma) / norm
        tap_r, tap_g, tap_b = _load_pixels(p, i_pixel + (at - position) * step, inside)
        r += weight * tap_r
        g += weight * tap_g
        b += weight * tap_b
    return r, g, b


@triton.jit
def blur_rows_kernel(p_levels, p_sigma, p_rows, pixels, W, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    """Blur along x: uint8 `p_levels` to float32 `p_rows`, the blurred samples only."""
    i_n, _, i_pixel, inside = _pixels(pixels, BLOCK)
    sigma = tl.load(p_sigma + i_n)
    if sigma > 0:
        p = p_levels + i_n * pixels * 3
        r, g, b = _blur_line(p, i_pixel, i_pixel % W, W, 1, sigma, inside, TAPS)
        p_out = p_rows + i_n * pixels * 3 + 3 * i_pixel
        tl.store(p_out, r, mask=inside)
        tl.store(p_out + 1, g, mask=inside)
        tl.store(p_out + 2, b, mask=inside)


@triton.jit
def _round(x):
    """Round to the nearest whole number, halves to even, for 0 <= x < 2**22."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2**23: float32 has no fraction there


@triton.jit
def blur_columns_kernel(
    p_rows, p_sigma, p_solarize, p_out, pixels, W,
    scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    NORMALISE: tl.constexpr, CHANNELS_LAST: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Blur along y and finish the blurred samples."""
    i_n, _, i_pixel, inside = _pixels(pixels, BLOCK)
    sigma = tl.load(p_sigma + i_n)
    if sigma > 0:
        p = p_rows + i_n * pixels * 3
        r, g, b = _blur_line(p, i_pixel, i_pixel // W, pixels // W, W, sigma, inside, TAPS)
        _finish(
            p_out + i_n * pixels * 3, i_pixel, _round(r), _round(g), _round(b),
            tl.load(p_solarize + i_n), inside, pixels,
            scale_r, scale_g, scale_b, shift_r, shift_g, shift_b, NORMALISE, CHANNELS_LAST,
        )  # fmt: skip
