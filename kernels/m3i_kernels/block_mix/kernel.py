# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Triton kernel of block mixing.

    mix[n] = mask[n] * a[n] + (1 - mask[n]) * a[partner[n]],    a = (view_a / 255 - mean) / std

A program owns up to BLOCK_ROWS pixel rows of one mask patch of one image, so that which image is
seen is one scalar: the mix reads only the source it needs, in vectors, and where that is image n
itself the clean view has just brought it in. Prefixes: p_ pointer, o_ offset in elements, i_ index.
"""

import triton
import triton.language as tl


@triton.jit
def _normalise(p_in, o_in, p_out, o_out, scale, shift, mask):
    """Read uint8 at o_in, write `x * scale + shift` at o_out."""
    x = tl.load(p_in + o_in, mask=mask, other=0).to(tl.float32)
    tl.store(p_out + o_out, (x * scale + shift).to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def _normalise_views(
    p_a, p_b, p_mix, p_clean_a, p_clean_b, image, source, o_in, o_out,
    scale, shift, mask, HAS_B: tl.constexpr,
):  # fmt: skip
    _normalise(p_a + image, o_in, p_clean_a + image, o_out, scale, shift, mask)
    _normalise(p_a + source, o_in, p_mix + image, o_out, scale, shift, mask)
    if HAS_B:
        _normalise(p_b + image, o_in, p_clean_b + image, o_out, scale, shift, mask)


@triton.jit
def block_mix_kernel(
    p_a, p_b, p_partner, p_seen, p_mix, p_clean_a, p_clean_b,
    scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    H: tl.constexpr, W: tl.constexpr, PATCH: tl.constexpr, HAS_B: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write mix, clean_a and clean_b; inputs and outputs are dense."""
    GRID_W: tl.constexpr = W // PATCH
    GRID_H: tl.constexpr = H // PATCH
    CHUNKS: tl.constexpr = (PATCH + BLOCK_ROWS - 1) // BLOCK_ROWS
    pid = tl.program_id(0)
    chunk = pid % CHUNKS
    patch_x = pid // CHUNKS % GRID_W
    patch_y = pid // (CHUNKS * GRID_W) % GRID_H
    i_n = (pid // (CHUNKS * GRID_W * GRID_H)).to(tl.int64)
    seen = tl.load(p_seen + i_n * (GRID_H * GRID_W) + patch_y * GRID_W + patch_x)
    partner = tl.load(p_partner + i_n)
    image = i_n * (H * W * 3)
    source = tl.where(seen != 0, i_n, partner) * (H * W * 3)

    i_row = chunk * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    i_y = (patch_y * PATCH + i_row)[:, None]
    rows = (i_row < PATCH)[:, None]
    i_c = tl.arange(0, BLOCK_COLUMNS)[None, :]
    if CHANNELS_LAST:  # one run of 3 * PATCH neighbouring elements per row
        scale = tl.where(i_c % 3 == 0, scale_r, tl.where(i_c % 3 == 1, scale_g, scale_b))
        shift = tl.where(i_c % 3 == 0, shift_r, tl.where(i_c % 3 == 1, shift_g, shift_b))
        o = i_y * (W * 3) + patch_x * (PATCH * 3) + i_c
        _normalise_views(
            p_a, p_b, p_mix, p_clean_a, p_clean_b, image, source, o, o,
            scale, shift, rows & (i_c < 3 * PATCH), HAS_B,
        )  # fmt: skip
    else:
        o = i_y * W + patch_x * PATCH + i_c
        mask = rows & (i_c < PATCH)
        _normalise_views(
            p_a, p_b, p_mix, p_clean_a, p_clean_b, image, source, o * 3, o,
            scale_r, shift_r, mask, HAS_B,
        )  # fmt: skip
        _normalise_views(
            p_a, p_b, p_mix, p_clean_a, p_clean_b, image, source, o * 3 + 1, o + H * W,
            scale_g, shift_g, mask, HAS_B,
        )  # fmt: skip
        _normalise_views(
            p_a, p_b, p_mix, p_clean_a, p_clean_b, image, source, o * 3 + 2, o + 2 * H * W,
            scale_b, shift_b, mask, HAS_B,
        )  # fmt: skip
