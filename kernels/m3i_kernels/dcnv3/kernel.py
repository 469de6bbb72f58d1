# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"
"""Triton kernels of deformable convolution v3.

Forward, for output position p0, group g and its points k (zero outside the image):

    y_g(p0)  = sum_k  m_gk(p0) * x_g( l_gk(p0) )
    l_gk(p0) = c(p0) + offset_scale * (p_k + dp_gk(p0))

with `m = softmax_k(logits)` when the softmax is fused, and `(1 - s) * y + s * x` when the
centre-feature-scale s is fused. With t = l - floor(l) = (tx, ty) and corners v00, v01 (right of
it), v10 (below it), v11, bilinear reading is

    x_g(l) = (1-ty)(1-tx) v00 + (1-ty) tx v01 + ty (1-tx) v10 + ty tx v11.

Backward, with the incoming gradient G and h = (1 - s) * G, from the four dot products
`d_c = <h, v_c>` over the channels of the group:

    dm_k  = (1-ty)(1-tx) d00 + (1-ty) tx d01 + ty (1-tx) d10 + ty tx d11
    ddx_k = offset_scale * m_k * ((1-ty) (d01 - d00) + ty (d11 - d10))
    ddy_k = offset_scale * m_k * ((1-tx) (d10 - d00) + tx (d11 - d01))
    dx   += m_k * corner weight * h   scattered to each of the four corners
    dlogit_k = m_k * (dm_k - sum_j m_j dm_j)

A program owns BLOCK_P output positions (of the flattened N * Ho * Wo) and BLOCK_G neighbouring
groups: BLOCK_R = BLOCK_P * BLOCK_G rows of BLOCK_D channels. Prefixes: p_ pointer, s_ stride in
elements, o_ offset in elements, b_ tile of values, i_ index.
"""

import triton
import triton.language as tl

from m3i_kernels.dcnv3.words import first_corner, next_corner, packed, pair_of, unpacked

# Image sizes vary from call to call: one compilation serves them all.
_SIZES = ["H", "W", "Ho", "Wo", "positions"]
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(
    Ho, Wo, positions,
    G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Locate the rows of this program: (image int64, oy, ox, group, position int64, valid).

    Rows past the end read what the last row reads, so no load needs a mask.
    """
    tiles_g: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    pid = tl.program_id(0)
    i_r = tl.arange(0, BLOCK_P * BLOCK_G)
    i_g = (pid % tiles_g) * BLOCK_G + i_r % BLOCK_G
    # Positions are counted in 64 bits only where `positions` needs them.
    first = (pid // tiles_g).to(positions.dtype) * BLOCK_P
    i_position = first + tl.minimum(i_r // BLOCK_G, positions - 1 - first)
    valid = (i_r // BLOCK_G < positions - first) & (i_g < G)
    i_image = i_position // (Ho * Wo)
    i_q = (i_position - i_image * (Ho * Wo)).to(tl.int32)
    i_y = i_q // Wo
    i_x = i_q - i_y * Wo
    i_g = tl.minimum(i_g, G - 1)
    return i_image.to(tl.int64), i_y, i_x, i_g, i_position.to(tl.int64), valid


@triton.jit
def _load_pair(p, PAIRED: tl.constexpr):
    """Read two neighbours (R,) as float32; with PAIRED, which needs alignment, in one load."""
    if not PAIRED:
        return tl.load(p).to(tl.float32), tl.load(p + 1).to(tl.float32)
    if p.dtype.element_ty == tl.float32:
        wide = tl.load(p.to(tl.pointer_type(tl.int64)))
        first = wide.to(tl.int32).to(tl.float32, bitcast=True)
        return first, (wide >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    pair = tl.load(p.to(tl.pointer_type(tl.int32)))
    if p.dtype.element_ty == tl.bfloat16:  # the upper half of a float32
        first = (pair << 16).to(tl.float32, bitcast=True)
        return first, (pair & -65536).to(tl.float32, bitcast=True)
    first = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return first, (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _location(
    p_pair, k, center_y, center_x, offset_scale,
    KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    REMOVE_CENTER: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """Place point k of every row, (y, x) in input pixels; `p_pair` is the offset of point 0."""
    kk = k
    if REMOVE_CENTER:
        kk += tl.where(k >= (KH * KW) // 2, 1, 0)
    grid_x = (kk // KH - KW // 2) * DW
    grid_y = (kk % KH - KH // 2) * DH
    dx, dy = _load_pair(p_pair + 2 * k, PAIRED)
    return center_y + offset_scale * (grid_y + dy), center_x + offset_scale * (grid_x + dx)


@triton.jit
def _center(i, K: tl.constexpr, S: tl.constexpr, P: tl.constexpr, D: tl.constexpr):
    """Kernel's centre on one axis at output index i; K, S, P, D as in a convolution."""
    return (i * S + (D * (K // 2) - P)).to(tl.float32)


@triton.jit
def _is_inside(i, size):
    return i.to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)


@triton.jit
def _neighbours(location):
    """Pixels left and right of a location on one axis: (first index, fraction).

    Far outside, the conversion to an integer saturates, which is outside as well.
    """
    first = tl.floor(location)
    return first.to(tl.int32), location - first


@triton.jit
def _clamped(i, size, stride, WIDE: tl.constexpr, RELU: tl.constexpr):
    """Element offset of index i on one axis, moved into the image where it is outside.

    With RELU in one instruction from sm_90 on. bfloat16 always has it; for other types each kernel
    asks for the order of the two that does not spill there (kernels/bench/results).
    """
    if RELU:  # noqa: SIM108  two lines that each say one thing
        i = tl.maximum(tl.minimum(i, size - 1), 0)
    else:
        i = tl.minimum(tl.maximum(i, 0), size - 1)
    if WIDE:  # no return in here: Triton 3.6 compiles what follows a return as well
        i = i.to(tl.int64)
    return i * stride


@triton.jit
def _load_units(p, i_d, D: tl.constexpr, FULL: tl.constexpr):
    """Read units i_d of every row, zero beyond D."""
    mask = None
    if not FULL:
        mask = (i_d < D)[None, :]
    return tl.load(p, mask=mask)


@triton.jit
def _load_chunk(p, i_d, D: tl.constexpr, FULL: tl.constexpr, WORDS: tl.constexpr):
    """Read units i_d of every row as float32, zero beyond D: (values, values of upper halves)."""
    b = _load_units(p, i_d, D, FULL)
    if WORDS != "":
        return unpacked(b, WORDS)
    else:  # noqa: RET505  without it the compiler would see two kinds of result
        return b.to(tl.float32), 0.0


@triton.jit
def _add_corner(b_y, b_z, p, i_d, w, D: tl.constexpr, FULL: tl.constexpr, WORDS: tl.constexpr):
    """Add one weighted corner to units i_d of every row."""
    v, u = _load_chunk(p, i_d, D, FULL, WORDS)
    b_y += w[:, None] * v
    if WORDS != "":
        b_z += w[:, None] * u
    return b_y, b_z


@triton.jit
def _add_corners(
    b_y, b_z, p00, p01, p10, p11, i_d, m, w00, w01, w10, w11,
    D: tl.constexpr, FULL: tl.constexpr, WORDS: tl.constexpr, HALF: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Add the corners of one point, weighted by w and with HALF by m, to units i_d of every row.

    With HALF the four weights are pairs, see `words.py`, and what is added is m times their blend.
    """
    if HALF:
        v = first_corner(w00[:, None], _load_units(p00, i_d, D, FULL), WORDS, PTX)
        v = next_corner(w01[:, None], _load_units(p01, i_d, D, FULL), v, WORDS, PTX)
        v = next_corner(w10[:, None], _load_units(p10, i_d, D, FULL), v, WORDS, PTX)
        v = next_corner(w11[:, None], _load_units(p11, i_d, D, FULL), v, WORDS, PTX)
        low, high = unpacked(v, WORDS)
        return b_y + m[:, None] * low, b_z + m[:, None] * high
    else:  # noqa: RET505  as above
        b_y, b_z = _add_corner(b_y, b_z, p00, i_d, w00, D, FULL, WORDS)
        b_y, b_z = _add_corner(b_y, b_z, p01, i_d, w01, D, FULL, WORDS)
        b_y, b_z = _add_corner(b_y, b_z, p10, i_d, w10, D, FULL, WORDS)
        return _add_corner(b_y, b_z, p11, i_d, w11, D, FULL, WORDS)


@triton.jit
def _finish_row(
    b_y, b_z, p_here, p_out, i_d, valid, scale, gate,
    D: tl.constexpr, FULL: tl.constexpr, GATED: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Normalise, blend with the centre feature and store units i_d of every row."""
    b_y *= scale[:, None]
    b_z *= scale[:, None]
    if GATED:
        b_y, b_z = _add_corner(b_y, b_z, p_here, i_d, gate, D, FULL, WORDS)
    mask = valid[:, None]
    if not FULL:
        mask = mask & (i_d < D)[None, :]
    if WORDS != "":
        tl.store(p_out, packed(b_y, b_z, WORDS), mask=mask)
    else:
        tl.store(p_out, b_y.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def _softmax_max(p_logit, K: tl.constexpr):
    """Largest logit of every row in units of log(2); one by one, which keeps the rows' layout."""
    b_max = tl.load(p_logit).to(tl.float32)
    for k in tl.static_range(1, K):
        b_max = tl.maximum(b_max, tl.load(p_logit + k).to(tl.float32))
    return b_max * LOG2_E


@triton.jit
def _weight(p_weight, k, b_max, LOGITS: tl.constexpr):
    """Weight of point k of every row; with LOGITS not yet divided by the sum over points."""
    m = tl.load(p_weight + k).to(tl.float32)
    if LOGITS:
        m = tl.exp2(m * LOG2_E - b_max)
    return m


@triton.jit(do_not_specialize=_SIZES)
def dcnv3_forward_kernel(
    p_x, p_offset, p_mask, p_gate, p_y,
    s_xn, s_xh, s_xw, s_on, s_oh, s_ow, s_mn, s_mh, s_mw, s_gn, s_gh, s_gw,
    H, W, Ho, Wo, positions, offset_scale,
    G: tl.constexpr, D: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, REMOVE_CENTER: tl.constexpr,
    LOGITS: tl.constexpr, GATED: tl.constexpr, WIDE: tl.constexpr, PAIRED: tl.constexpr,
    WORDS: tl.constexpr, HALF: tl.constexpr, PTX: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Write y (N, Ho, Wo, C); see the module's formula.

    With WORDS, "bf16" or "f16", x and y are of that type and read as int32, which needs channels
    per group, strides and first address to be multiples of 8 elements; all strides still count
    elements. With HALF, which needs WORDS, the four corners of a point are blended in that type.
    """
    K: tl.constexpr = KH * KW - REMOVE_CENTER
    BLOCK_R: tl.constexpr = BLOCK_P * BLOCK_G
    FULL: tl.constexpr = SPLIT * BLOCK_D == D
    RELU: tl.constexpr = (WORDS != "") | (D <= 16)
    UNITS: tl.constexpr = D // 2 if WORDS != "" else D
    BLOCK_U: tl.constexpr = BLOCK_D // 2 if WORDS != "" else BLOCK_D
    if WORDS != "":
        s_xn = tl.multiple_of(s_xn // 2, 4)
        s_xh = tl.multiple_of(s_xh // 2, 4)
        s_xw = tl.multiple_of(s_xw // 2, 4)
    i_n, i_y, i_x, i_g, i_position, valid = _rows(Ho, Wo, positions, G, BLOCK_P, BLOCK_G)
    i_d = tl.arange(0, BLOCK_U)
    p_row = (p_x + i_n * s_xn + i_g * UNITS)[:, None] + i_d[None, :]
    wide_y, wide_x = i_y.to(tl.int64), i_x.to(tl.int64)
    p_pair = p_offset + (i_n * s_on + wide_y * s_oh + wide_x * s_ow) + i_g * (2 * K)
    p_weight = p_mask + (i_n * s_mn + wide_y * s_mh + wide_x * s_mw) + i_g * K
    center_y, center_x = _center(i_y, KH, SH, PH, DH), _center(i_x, KW, SW, PW, DW)
    b_max = tl.zeros((BLOCK_R,), tl.float32)
    b_sum = tl.zeros((BLOCK_R,), tl.float32)
    if LOGITS:
        b_max = _softmax_max(p_weight, K)
    b_y = tl.zeros((BLOCK_R, BLOCK_U), tl.float32)
    b_z, b_y2, b_z2 = b_y, b_y, b_y  # upper halves of words; the second chunk of a row

    for k in tl.range(0, K, loop_unroll_factor=UNROLL):
        l_y, l_x = _location(
            p_pair, k, center_y, center_x, offset_scale, KH, KW, DH, DW, REMOVE_CENTER, PAIRED
        )
        m = _weight(p_weight, k, b_max, LOGITS)
        b_sum += m
        y0, b = _neighbours(l_y)
        x0, t = _neighbours(l_x)
        whole = m  # what the four weights sum up to, inside of the image
        if HALF:
            whole = 1.0
        b *= whole
        a = tl.where(_is_inside(y0, H), whole - b, 0.0)
        b = tl.where(_is_inside(y0 + 1, H), b, 0.0)
        u = tl.where(_is_inside(x0, W), 1 - t, 0.0)
        t = tl.where(_is_inside(x0 + 1, W), t, 0.0)
        o_y0 = _clamped(y0, H, s_xh, WIDE, RELU)
        o_y1 = _clamped(y0 + 1, H, s_xh, WIDE, RELU)
        o_x0 = _clamped(x0, W, s_xw, WIDE, RELU)
        o_x1 = _clamped(x0 + 1, W, s_xw, WIDE, RELU)
        p00 = p_row + (o_y0 + o_x0)[:, None]
        p01 = p_row + (o_y0 + o_x1)[:, None]
        p10 = p_row + (o_y1 + o_x0)[:, None]
        p11 = p_row + (o_y1 + o_x1)[:, None]
        w00, w01, w10, w11 = a * u, a * t, b * u, b * t
        if HALF:
            w00, w01 = pair_of(w00, WORDS, PTX), pair_of(w01, WORDS, PTX)
            w10, w11 = pair_of(w10, WORDS, PTX), pair_of(w11, WORDS, PTX)
        b_y, b_z = _add_corners(
            b_y, b_z, p00, p01, p10, p11, i_d, m, w00, w01, w10, w11,
            UNITS, FULL, WORDS, HALF, PTX,
        )  # fmt: skip
        if SPLIT == 2:
            b_y2, b_z2 = _add_corners(
                b_y2, b_z2, p00 + BLOCK_U, p01 + BLOCK_U, p10 + BLOCK_U, p11 + BLOCK_U,
                i_d + BLOCK_U, m, w00, w01, w10, w11, UNITS, FULL, WORDS, HALF, PTX,
            )  # fmt: skip

    scale = tl.full((BLOCK_R,), 1.0, tl.float32)
    if LOGITS:
        scale = 1 / b_sum
    gate = scale
    p_here = p_row
    if GATED:
        p_gate += i_n * s_gn + wide_y * s_gh + wide_x * s_gw + i_g
        gate = tl.load(p_gate).to(tl.float32)
        scale *= 1 - gate
        p_here += (_clamped(i_y, H, s_xh, WIDE, RELU) + _clamped(i_x, W, s_xw, WIDE, RELU))[:, None]
    p_out = (p_y + i_position * (G * UNITS) + i_g * UNITS)[:, None] + i_d[None, :]
    _finish_row(b_y, b_z, p_here, p_out, i_d, valid, scale, gate, UNITS, FULL, GATED, WORDS)
    if SPLIT == 2:
        p_here += BLOCK_U
        p_out += BLOCK_U
        i_d += BLOCK_U
        _finish_row(b_y2, b_z2, p_here, p_out, i_d, valid, scale, gate, UNITS, FULL, GATED, WORDS)
