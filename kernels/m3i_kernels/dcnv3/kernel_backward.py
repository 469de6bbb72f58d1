# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"
"""Triton kernel of DCNv3's backward pass; formula, tiles and prefixes are those of `kernel.py`."""

import triton
import triton.language as tl

from m3i_kernels.dcnv3.kernel import (
    _SIZES,
    _center,
    _clamped,
    _is_inside,
    _load_chunk,
    _location,
    _neighbours,
    _rows,
    _softmax_max,
    _weight,
)


@triton.jit
def _chunks(p, i_d, SPLIT: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, WORDS: tl.constexpr):
    """Read all chunks of every row as a tuple: value, upper half, value, upper half, ..."""
    chunks = ()
    for c in tl.static_range(SPLIT):
        chunks += _load_chunk(p + c * BLOCK, i_d + c * BLOCK, D, SPLIT * BLOCK == D, WORDS)
    return chunks


@triton.jit
def _dot(
    chunks, p, i_d,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Dot product of every row of `chunks`, as from `_chunks`, with the row at p, (R,)."""
    b = tl.zeros(chunks[0].shape, tl.float32)
    for c in tl.static_range(SPLIT):
        v, u = _load_chunk(p + c * BLOCK, i_d + c * BLOCK, D, SPLIT * BLOCK == D, WORDS)
        b += chunks[2 * c] * v
        if WORDS != "":
            b += chunks[2 * c + 1] * u
    return tl.sum(b, axis=1)


@triton.jit
def _scatter(
    p, i_d, chunks, w, inside, unit,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, FIXED_POINT: tl.constexpr,
):  # fmt: skip
    """Add w times `chunks` at p to every row inside; in units of 1 / unit when FIXED_POINT."""
    for c in tl.static_range(SPLIT):
        mask = inside[:, None]
        if SPLIT * BLOCK != D:
            mask = mask & (i_d + c * BLOCK < D)[None, :]
        b = w[:, None] * chunks[2 * c]
        if FIXED_POINT:
            b = (b * unit).to(tl.int64)
        tl.atomic_add(p + c * BLOCK, b, mask=mask, sem="relaxed")


@triton.jit
def _store_pair(p, first, second, mask):
    """Write two neighbours (R,) of a contiguous tensor of pairs in one store."""
    if p.dtype.element_ty == tl.float32:
        low = first.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        high = second.to(tl.int32, bitcast=True).to(tl.int64) << 32
        tl.store(p.to(tl.pointer_type(tl.int64)), low | high, mask=mask)
    else:
        low = first.to(p.dtype.element_ty).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        high = second.to(p.dtype.element_ty).to(tl.int16, bitcast=True).to(tl.int32) << 16
        tl.store(p.to(tl.pointer_type(tl.int32)), low | high, mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def dcnv3_backward_kernel(
    p_grad, p_x, p_offset, p_mask, p_gate, p_y, p_unit, p_dx, p_doffset, p_dmask, p_dgate,
    s_xn, s_xh, s_xw, s_on, s_oh, s_ow, s_mn, s_mh, s_mw, s_gn, s_gh, s_gw, s_dn, s_dh,
    H, W, Ho, Wo, positions, offset_scale,
    G: tl.constexpr, D: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, REMOVE_CENTER: tl.constexpr,
    LOGITS: tl.constexpr, GATED: tl.constexpr, WIDE: tl.constexpr, PAIRED: tl.constexpr,
    FIXED_POINT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Write the gradients of offset, mask and gate, and add that of x; see the module's formula.

    `p_dx` is contiguous (N, H, W, C), zero on entry: float32, added to in the order in which
    programs happen to run, or with FIXED_POINT int64 in units of 1 / unit, whose sum is the same
    in every order. `p_y` is the forward result: `sum_j m_j dm_j = <h, y>` before the blend.
    """
    K: tl.constexpr = KH * KW - REMOVE_CENTER
    C: tl.constexpr = G * D
    RELU: tl.constexpr = (p_x.dtype.element_ty == tl.bfloat16) | (D > 16)
    BLOCK_R: tl.constexpr = BLOCK_P * BLOCK_G
    i_n, i_y, i_x, i_g, i_position, valid = _rows(Ho, Wo, positions, G, BLOCK_P, BLOCK_G)
    i_d = tl.arange(0, BLOCK_D)
    p_row = (p_x + i_n * s_xn + i_g * D)[:, None] + i_d[None, :]
    p_dx_row = (p_dx + i_n * s_dn + i_g * D)[:, None] + i_d[None, :]
    o_row = (i_position * C + i_g * D)[:, None] + i_d[None, :]
    wide_y, wide_x = i_y.to(tl.int64), i_x.to(tl.int64)
    p_pair = p_offset + (i_n * s_on + wide_y * s_oh + wide_x * s_ow) + i_g * (2 * K)
    p_weight = p_mask + (i_n * s_mn + wide_y * s_mh + wide_x * s_mw) + i_g * K
    p_dpair = p_doffset + i_position * (G * 2 * K) + i_g * (2 * K)
    p_dweight = p_dmask + i_position * (G * K) + i_g * K
    center_y, center_x = _center(i_y, KH, SH, PH, DH), _center(i_x, KW, SW, PW, DW)
    unit = 1.0
    if FIXED_POINT:
        unit = tl.load(p_unit)
    b_g = _chunks(p_grad + o_row, i_d, SPLIT, BLOCK_D, D, "")

    keep = tl.full((BLOCK_R,), 1.0, tl.float32)  # 1 - s
    g_x = tl.zeros((BLOCK_R,), tl.float32)  # <G, x> at the centre
    if GATED:
        p_gate += i_n * s_gn + wide_y * s_gh + wide_x * s_gw + i_g
        gate = tl.load(p_gate).to(tl.float32)
        keep = 1 - gate
        p = (
            p_row
            + (_clamped(i_y, H, s_xh, WIDE, RELU) + _clamped(i_x, W, s_xw, WIDE, RELU))[:, None]
        )
        g_x = _dot(b_g, p, i_d, SPLIT, BLOCK_D, D, "")
        p = (
            p_dx_row
            + (_clamped(i_y, H, s_dh, WIDE, RELU) + _clamped(i_x, W, C, WIDE, RELU))[:, None]
        )
        _scatter(p, i_d, b_g, gate, valid, unit, SPLIT, BLOCK_D, D, FIXED_POINT)
    b_max = tl.zeros((BLOCK_R,), tl.float32)
    normaliser = tl.full((BLOCK_R,), 1.0, tl.float32)
    h_y = tl.zeros((BLOCK_R,), tl.float32)
    if LOGITS:
        b_max = _softmax_max(p_weight, K)
        b_sum = tl.zeros((BLOCK_R,), tl.float32)
        for k in tl.static_range(K):
            b_sum += _weight(p_weight, k, b_max, LOGITS)
        normaliser = 1 / b_sum
        h_y = _dot(b_g, p_y + o_row, i_d, SPLIT, BLOCK_D, D, "") - (1 - keep) * g_x

    g_y = tl.zeros((BLOCK_R,), tl.float32)  # <G, y> before the blend
    for k in tl.range(0, K, loop_unroll_factor=UNROLL):
        l_y, l_x = _location(
            p_pair, k, center_y, center_x, offset_scale, KH, KW, DH, DW, REMOVE_CENTER, PAIRED
        )
        # An infinite location has no fraction; two pixels outside nothing is read either.
        y0, ty = _neighbours(tl.minimum(tl.maximum(l_y, -2.0), H + 1.0))
        x0, tx = _neighbours(tl.minimum(tl.maximum(l_x, -2.0), W + 1.0))
        m = _weight(p_weight, k, b_max, LOGITS) * normaliser
        in_y0, in_y1 = valid & _is_inside(y0, H), valid & _is_inside(y0 + 1, H)
        in_x0, in_x1 = _is_inside(x0, W), _is_inside(x0 + 1, W)
        o_y0, o_y1 = _clamped(y0, H, s_xh, WIDE, RELU), _clamped(y0 + 1, H, s_xh, WIDE, RELU)
        o_x0, o_x1 = _clamped(x0, W, s_xw, WIDE, RELU), _clamped(x0 + 1, W, s_xw, WIDE, RELU)
        d00 = _dot(b_g, p_row + (o_y0 + o_x0)[:, None], i_d, SPLIT, BLOCK_D, D, "")
        d01 = _dot(b_g, p_row + (o_y0 + o_x1)[:, None], i_d, SPLIT, BLOCK_D, D, "")
        d10 = _dot(b_g, p_row + (o_y1 + o_x0)[:, None], i_d, SPLIT, BLOCK_D, D, "")
        d11 = _dot(b_g, p_row + (o_y1 + o_x1)[:, None], i_d, SPLIT, BLOCK_D, D, "")
        d00 = tl.where(in_y0 & in_x0, d00, 0.0)
        d01 = tl.where(in_y0 & in_x1, d01, 0.0)
        d10 = tl.where(in_y1 & in_x0, d10, 0.0)
        d11 = tl.where(in_y1 & in_x1, d11, 0.0)
        top, bottom = d00 + tx * (d01 - d00), d10 + tx * (d11 - d10)
        dm = top + ty * (bottom - top)
        g_y += m * dm
        dm *= keep
        if LOGITS:
            dm = m * (dm - h_y)
        h = m * keep
        ddx = offset_scale * h * ((d01 - d00) + ty * ((d11 - d10) - (d01 - d00)))
        ddy = offset_scale * h * (bottom - top)
        _store_pair(p_dpair + 2 * k, ddx, ddy, valid)
        tl.store(p_dweight + k, dm.to(p_dmask.dtype.element_ty), mask=valid)

        o_y0, o_y1 = _clamped(y0, H, s_dh, WIDE, RELU), _clamped(y0 + 1, H, s_dh, WIDE, RELU)
        o_x0, o_x1 = _clamped(x0, W, C, WIDE, RELU), _clamped(x0 + 1, W, C, WIDE, RELU)
        b = h * ty
        a = h - b
        w01, w11 = a * tx, b * tx
        w00, w10 = a - w01, b - w11
        p = p_dx_row + (o_y0 + o_x0)[:, None]
        _scatter(p, i_d, b_g, w00, in_y0 & in_x0, unit, SPLIT, BLOCK_D, D, FIXED_POINT)
        p = p_dx_row + (o_y0 + o_x1)[:, None]
        _scatter(p, i_d, b_g, w01, in_y0 & in_x1, unit, SPLIT, BLOCK_D, D, FIXED_POINT)
        p = p_dx_row + (o_y1 + o_x0)[:, None]
        _scatter(p, i_d, b_g, w10, in_y1 & in_x0, unit, SPLIT, BLOCK_D, D, FIXED_POINT)
        p = p_dx_row + (o_y1 + o_x1)[:, None]
        _scatter(p, i_d, b_g, w11, in_y1 & in_x1, unit, SPLIT, BLOCK_D, D, FIXED_POINT)

    if GATED:
        p = p_dgate + i_position * G + i_g
        tl.store(p, (g_x - g_y).to(p_dgate.dtype.element_ty), mask=valid)
