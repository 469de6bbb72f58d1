# mypy: disable-error-code="no-untyped-def, no-untyped-call"
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

# Image sizes vary from call to call: one compilation serves them all.
_SIZES = ["H", "W", "Ho", "Wo", "positions"]


@triton.jit
def _rows(
    Ho, Wo, positions,
    G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Locate the rows of this program: (image int64, oy, ox, group, position int64, valid)."""
    tiles_g: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    pid = tl.program_id(0)
    i_r = tl.arange(0, BLOCK_P * BLOCK_G)
    i_g = (pid % tiles_g) * BLOCK_G + i_r % BLOCK_G
    # Only the first position needs 64 bits: from there on, 32-bit arithmetic inside the tile.
    first = (pid // tiles_g).to(tl.int64) * BLOCK_P
    first_image = first // (Ho * Wo)
    i_q = (first - first_image * (Ho * Wo)).to(tl.int32) + i_r // BLOCK_G
    i_image = i_q // (Ho * Wo)
    i_q -= i_image * (Ho * Wo)
    i_y = i_q // Wo
    i_position = first + i_r // BLOCK_G
    valid = (i_position < positions) & (i_g < G)
    return first_image + i_image, i_y, i_q - i_y * Wo, i_g, i_position, valid


@triton.jit
def _location(
    p_offset, o_offset, k, i_y, i_x, valid, H, W, offset_scale,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    REMOVE_CENTER: tl.constexpr,
):  # fmt: skip
    """Place point k of every row: top left corner (y0, x0) and fractions (ty, tx)."""
    kk = k
    if REMOVE_CENTER:
        kk += tl.where(k >= (KH * KW) // 2, 1, 0)
    grid_x = (kk // KH - KW // 2) * DW
    grid_y = (kk % KH - KH // 2) * DH
    dx = tl.load(p_offset + o_offset + 2 * k, mask=valid, other=0.0).to(tl.float32)
    dy = tl.load(p_offset + o_offset + 2 * k + 1, mask=valid, other=0.0).to(tl.float32)
    center_x = i_x * SW + (DW * (KW // 2) - PW)
    center_y = i_y * SH + (DH * (KH // 2) - PH)
    l_x = center_x.to(tl.float32) + offset_scale * (grid_x + dx)
    l_y = center_y.to(tl.float32) + offset_scale * (grid_y + dy)
    # Beyond one pixel outside the image nothing is read; clamping keeps the integers in range.
    l_x = tl.minimum(tl.maximum(l_x, -2.0), W + 1.0)
    l_y = tl.minimum(tl.maximum(l_y, -2.0), H + 1.0)
    x0 = tl.floor(l_x)
    y0 = tl.floor(l_y)
    return y0.to(tl.int32), x0.to(tl.int32), l_y - y0, l_x - x0


@triton.jit
def _corner(y, x, H, W, s_h, s_w, valid, WIDE: tl.constexpr):
    """Element offset of pixel (y, x) inside its image, and whether it is inside."""
    inside = valid & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    if WIDE:
        return y.to(tl.int64) * s_h + x.to(tl.int64) * s_w, inside
    return y * s_h + x * s_w, inside


@triton.jit
def _load_corner(p_row, o_pixel, i_d, inside, D: tl.constexpr, FULL: tl.constexpr):
    """Read channels i_d of one corner of every row, zero outside, as float32 (R, len(i_d))."""
    p = p_row[:, None] + (o_pixel[:, None] + i_d[None, :])
    mask = inside[:, None]
    if not FULL:
        mask = mask & (i_d < D)[None, :]
    return tl.load(p, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _add_corners(
    b_y, p_row, i_d, o00, o01, o10, o11, in00, in01, in10, in11, w00, w01, w10, w11,
    D: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Add the weighted corners of one point to channels i_d of every row."""
    v00 = _load_corner(p_row, o00, i_d, in00, D, FULL)
    v01 = _load_corner(p_row, o01, i_d, in01, D, FULL)
    v10 = _load_corner(p_row, o10, i_d, in10, D, FULL)
    v11 = _load_corner(p_row, o11, i_d, in11, D, FULL)
    b_y += w00[:, None] * v00
    b_y += w01[:, None] * v01
    b_y += w10[:, None] * v10
    b_y += w11[:, None] * v11
    return b_y


@triton.jit
def _finish_row(
    b_y, p_row, p_out, i_d, o_here, valid, gate, normaliser,
    D: tl.constexpr, FULL: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Normalise, blend with the centre feature and store channels i_d of every row."""
    b_y *= normaliser[:, None]
    if GATED:
        b_y += gate[:, None] * (_load_corner(p_row, o_here, i_d, valid, D, FULL) - b_y)
    mask = valid[:, None]
    if not FULL:
        mask = mask & (i_d < D)[None, :]
    tl.store(p_out[:, None] + i_d[None, :], b_y.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def _softmax_max(p_mask, o_mask, valid, K: tl.constexpr, BLOCK_R: tl.constexpr):
    """Largest logit of every row, (R,); point by point, which keeps the layout of the rows."""
    b_max = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    for k in tl.static_range(K):
        logit = tl.load(p_mask + o_mask + k, mask=valid, other=0.0).to(tl.float32)
        b_max = tl.maximum(b_max, logit)
    return b_max


@triton.jit(do_not_specialize=_SIZES)
def dcnv3_forward_kernel(
    p_x, p_offset, p_mask, p_gate, p_y,
    s_xn, s_xh, s_xw, s_on, s_oh, s_ow, s_mn, s_mh, s_mw, s_gn, s_gh, s_gw,
    H, W, Ho, Wo, positions, offset_scale,
    G: tl.constexpr, D: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, REMOVE_CENTER: tl.constexpr,
    LOGITS: tl.constexpr, GATED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Write y (N, Ho, Wo, C); see the module's formula."""
    K: tl.constexpr = KH * KW - REMOVE_CENTER
    BLOCK_R: tl.constexpr = BLOCK_P * BLOCK_G
    FULL: tl.constexpr = SPLIT * BLOCK_D == D
    i_n, i_y, i_x, i_g, i_position, valid = _rows(Ho, Wo, positions, G, BLOCK_P, BLOCK_G)
    i_d = tl.arange(0, BLOCK_D)
    p_row = p_x + i_n * s_xn + i_g * D
    o_offset = i_n * s_on + i_y.to(tl.int64) * s_oh + i_x.to(tl.int64) * s_ow + i_g * (2 * K)
    o_mask = i_n * s_mn + i_y.to(tl.int64) * s_mh + i_x.to(tl.int64) * s_mw + i_g * K
    if LOGITS:
        b_max = _softmax_max(p_mask, o_mask, valid, K, BLOCK_R)
        b_sum = tl.zeros((BLOCK_R,), tl.float32)
    b_y = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    if SPLIT == 2:
        b_y2 = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)

    for k in tl.range(0, K, loop_unroll_factor=UNROLL):
        y0, x0, ty, tx = _location(
            p_offset, o_offset, k, i_y, i_x, valid, H, W, offset_scale,
            KH, KW, SH, SW, PH, PW, DH, DW, REMOVE_CENTER,
        )  # fmt: skip
        m = tl.load(p_mask + o_mask + k, mask=valid, other=0.0).to(tl.float32)
        if LOGITS:
            m = tl.exp(m - b_max)
            b_sum += m
        o00, in00 = _corner(y0, x0, H, W, s_xh, s_xw, valid, WIDE)
        o01, in01 = _corner(y0, x0 + 1, H, W, s_xh, s_xw, valid, WIDE)
        o10, in10 = _corner(y0 + 1, x0, H, W, s_xh, s_xw, valid, WIDE)
        o11, in11 = _corner(y0 + 1, x0 + 1, H, W, s_xh, s_xw, valid, WIDE)
        w11 = m * ty * tx
        w10 = m * ty - w11
        w01 = m * tx - w11
        w00 = m - m * ty - w01
        b_y = _add_corners(
            b_y, p_row, i_d, o00, o01, o10, o11, in00, in01, in10, in11, w00, w01, w10, w11,
            D, FULL,
        )  # fmt: skip
        if SPLIT == 2:
            b_y2 = _add_corners(
                b_y2, p_row, i_d + BLOCK_D, o00, o01, o10, o11, in00, in01, in10, in11,
                w00, w01, w10, w11, D, FULL,
            )  # fmt: skip

    normaliser = tl.full((BLOCK_R,), 1.0, tl.float32)
    if LOGITS:
        normaliser = 1 / b_sum
    gate = normaliser
    o_here = i_x
    if GATED:
        p_gate += i_n * s_gn + i_y.to(tl.int64) * s_gh + i_x.to(tl.int64) * s_gw + i_g
        gate = tl.load(p_gate, mask=valid, other=0.0).to(tl.float32)
        o_here, _ = _corner(i_y, i_x, H, W, s_xh, s_xw, valid, WIDE)
    p_out = p_y + i_position * (G * D) + i_g * D
    _finish_row(b_y, p_row, p_out, i_d, o_here, valid, gate, normaliser, D, FULL, GATED)
    if SPLIT == 2:
        i_d += BLOCK_D
        _finish_row(b_y2, p_row, p_out, i_d, o_here, valid, gate, normaliser, D, FULL, GATED)


@triton.jit
def _channels(p_row, i_d, valid, D: tl.constexpr, FULL: tl.constexpr):
    """Read channels i_d of every row as float32 (R, len(i_d))."""
    mask = valid[:, None]
    if not FULL:
        mask = mask & (i_d < D)[None, :]
    return tl.load(p_row[:, None] + i_d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _corner_dots(
    b_g, p_row, i_d, o00, o01, o10, o11, in00, in01, in10, in11,
    D: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Dot products of the incoming gradient with the four corners, each (R,)."""
    d00 = tl.sum(b_g * _load_corner(p_row, o00, i_d, in00, D, FULL), axis=1)
    d01 = tl.sum(b_g * _load_corner(p_row, o01, i_d, in01, D, FULL), axis=1)
    d10 = tl.sum(b_g * _load_corner(p_row, o10, i_d, in10, D, FULL), axis=1)
    d11 = tl.sum(b_g * _load_corner(p_row, o11, i_d, in11, D, FULL), axis=1)
    return d00, d01, d10, d11


@triton.jit
def _scatter(
    p_row, o_pixel, i_d, b, inside, unit,
    D: tl.constexpr, FULL: tl.constexpr, FIXED_POINT: tl.constexpr,
):  # fmt: skip
    """Add b to channels i_d of one corner of every row; in units of 1 / unit when FIXED_POINT."""
    p = p_row[:, None] + (o_pixel[:, None] + i_d[None, :])
    mask = inside[:, None]
    if not FULL:
        mask = mask & (i_d < D)[None, :]
    if FIXED_POINT:
        b = (b * unit).to(tl.int64)
    tl.atomic_add(p, b, mask=mask, sem="relaxed")


@triton.jit
def _scatter_corners(
    p_row, i_d, b_g, o00, o01, o10, o11, in00, in01, in10, in11, w00, w01, w10, w11, unit,
    D: tl.constexpr, FULL: tl.constexpr, FIXED_POINT: tl.constexpr,
):  # fmt: skip
    """Add the weighted incoming gradient to the four corners of one point."""
    _scatter(p_row, o00, i_d, w00[:, None] * b_g, in00, unit, D, FULL, FIXED_POINT)
    _scatter(p_row, o01, i_d, w01[:, None] * b_g, in01, unit, D, FULL, FIXED_POINT)
    _scatter(p_row, o10, i_d, w10[:, None] * b_g, in10, unit, D, FULL, FIXED_POINT)
    _scatter(p_row, o11, i_d, w11[:, None] * b_g, in11, unit, D, FULL, FIXED_POINT)


@triton.jit(do_not_specialize=_SIZES)
def dcnv3_backward_kernel(
    p_grad, p_x, p_offset, p_mask, p_gate, p_y, p_unit, p_dx, p_doffset, p_dmask, p_dgate,
    s_xn, s_xh, s_xw, s_on, s_oh, s_ow, s_mn, s_mh, s_mw, s_gn, s_gh, s_gw, s_dn, s_dh,
    H, W, Ho, Wo, positions, offset_scale,
    G: tl.constexpr, D: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, REMOVE_CENTER: tl.constexpr,
    LOGITS: tl.constexpr, GATED: tl.constexpr, WIDE: tl.constexpr, FIXED_POINT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Write the gradients of offset, mask and gate, and add that of x; see the module's formula.

    `p_dx` is contiguous (N, H, W, C), zero on entry: float32, added to in the order in which
    programs happen to run, or with FIXED_POINT int64 in units of 1 / unit, whose sum is the same
    in every order. `p_y` is the forward result: `sum_j m_j dm_j = <h, y>` before the blend.
    """
    K: tl.constexpr = KH * KW - REMOVE_CENTER
    C: tl.constexpr = G * D
    BLOCK_R: tl.constexpr = BLOCK_P * BLOCK_G
    FULL: tl.constexpr = SPLIT * BLOCK_D == D
    i_n, i_y, i_x, i_g, i_position, valid = _rows(Ho, Wo, positions, G, BLOCK_P, BLOCK_G)
    i_d = tl.arange(0, BLOCK_D)
    p_row = p_x + i_n * s_xn + i_g * D
    p_dx_row = p_dx + i_n * s_dn + i_g * D
    o_offset = i_n * s_on + i_y.to(tl.int64) * s_oh + i_x.to(tl.int64) * s_ow + i_g * (2 * K)
    o_mask = i_n * s_mn + i_y.to(tl.int64) * s_mh + i_x.to(tl.int64) * s_mw + i_g * K
    o_row = i_position * C + i_g * D
    unit = 1.0
    if FIXED_POINT:
        unit = tl.load(p_unit)
    b_g = _channels(p_grad + o_row, i_d, valid, D, FULL)
    if SPLIT == 2:
        b_g2 = _channels(p_grad + o_row, i_d + BLOCK_D, valid, D, FULL)

    keep = tl.full((BLOCK_R,), 1.0, tl.float32)  # 1 - s
    g_x = tl.zeros((BLOCK_R,), tl.float32)  # <G, x> at the centre
    if GATED:
        p_gate += i_n * s_gn + i_y.to(tl.int64) * s_gh + i_x.to(tl.int64) * s_gw + i_g
        gate = tl.load(p_gate, mask=valid, other=0.0).to(tl.float32)
        keep = 1 - gate
        o_here, _ = _corner(i_y, i_x, H, W, s_xh, s_xw, valid, WIDE)
        o_dx, _ = _corner(i_y, i_x, H, W, s_dh, C, valid, WIDE)
        g_x = tl.sum(b_g * _load_corner(p_row, o_here, i_d, valid, D, FULL), axis=1)
        _scatter(p_dx_row, o_dx, i_d, gate[:, None] * b_g, valid, unit, D, FULL, FIXED_POINT)
        if SPLIT == 2:
            b = b_g2 * _load_corner(p_row, o_here, i_d + BLOCK_D, valid, D, FULL)
            g_x += tl.sum(b, axis=1)
            b = gate[:, None] * b_g2
            _scatter(p_dx_row, o_dx, i_d + BLOCK_D, b, valid, unit, D, FULL, FIXED_POINT)
    if LOGITS:
        b_max = _softmax_max(p_mask, o_mask, valid, K, BLOCK_R)
        b_sum = tl.zeros((BLOCK_R,), tl.float32)
        for k in tl.static_range(K):
            logit = tl.load(p_mask + o_mask + k, mask=valid, other=0.0).to(tl.float32)
            b_sum += tl.exp(logit - b_max)
        h_y = tl.sum(b_g * _channels(p_y + o_row, i_d, valid, D, FULL), axis=1)
        if SPLIT == 2:
            h_y += tl.sum(b_g2 * _channels(p_y + o_row, i_d + BLOCK_D, valid, D, FULL), axis=1)
        h_y -= (1 - keep) * g_x

    g_y = tl.zeros((BLOCK_R,), tl.float32)  # <G, y> before the blend
    for k in tl.range(0, K, loop_unroll_factor=UNROLL):
        y0, x0, ty, tx = _location(
            p_offset, o_offset, k, i_y, i_x, valid, H, W, offset_scale,
            KH, KW, SH, SW, PH, PW, DH, DW, REMOVE_CENTER,
        )  # fmt: skip
        m = tl.load(p_mask + o_mask + k, mask=valid, other=0.0).to(tl.float32)
        if LOGITS:
            m = tl.exp(m - b_max) / b_sum
        o00, in00 = _corner(y0, x0, H, W, s_xh, s_xw, valid, WIDE)
        o01, in01 = _corner(y0, x0 + 1, H, W, s_xh, s_xw, valid, WIDE)
        o10, in10 = _corner(y0 + 1, x0, H, W, s_xh, s_xw, valid, WIDE)
        o11, in11 = _corner(y0 + 1, x0 + 1, H, W, s_xh, s_xw, valid, WIDE)
        d00, d01, d10, d11 = _corner_dots(
            b_g, p_row, i_d, o00, o01, o10, o11, in00, in01, in10, in11, D, FULL,
        )  # fmt: skip
        if SPLIT == 2:
            e00, e01, e10, e11 = _corner_dots(
                b_g2, p_row, i_d + BLOCK_D, o00, o01, o10, o11, in00, in01, in10, in11, D, FULL,
            )  # fmt: skip
            d00 += e00
            d01 += e01
            d10 += e10
            d11 += e11
        dm = (1 - ty) * ((1 - tx) * d00 + tx * d01) + ty * ((1 - tx) * d10 + tx * d11)
        g_y += m * dm
        dm *= keep
        if LOGITS:
            dm = m * (dm - h_y)
        h = m * keep
        ddx = offset_scale * h * ((1 - ty) * (d01 - d00) + ty * (d11 - d10))
        ddy = offset_scale * h * ((1 - tx) * (d10 - d00) + tx * (d11 - d01))
        p_pair = p_doffset + i_position * (G * 2 * K) + i_g * (2 * K) + 2 * k
        tl.store(p_pair, ddx.to(p_doffset.dtype.element_ty), mask=valid)
        tl.store(p_pair + 1, ddy.to(p_doffset.dtype.element_ty), mask=valid)
        p_weight = p_dmask + i_position * (G * K) + i_g * K + k
        tl.store(p_weight, dm.to(p_dmask.dtype.element_ty), mask=valid)

        o00, _ = _corner(y0, x0, H, W, s_dh, C, valid, WIDE)
        o01, _ = _corner(y0, x0 + 1, H, W, s_dh, C, valid, WIDE)
        o10, _ = _corner(y0 + 1, x0, H, W, s_dh, C, valid, WIDE)
        o11, _ = _corner(y0 + 1, x0 + 1, H, W, s_dh, C, valid, WIDE)
        w11 = h * ty * tx
        w10 = h * ty - w11
        w01 = h * tx - w11
        w00 = h - h * ty - w01
        _scatter_corners(
            p_dx_row, i_d, b_g, o00, o01, o10, o11, in00, in01, in10, in11,
            w00, w01, w10, w11, unit, D, FULL, FIXED_POINT,
        )  # fmt: skip
        if SPLIT == 2:
            _scatter_corners(
                p_dx_row, i_d + BLOCK_D, b_g2, o00, o01, o10, o11, in00, in01, in10, in11,
                w00, w01, w10, w11, unit, D, FULL, FIXED_POINT,
            )  # fmt: skip

    if GATED:
        p = p_dgate + i_position * G + i_g
        tl.store(p, (g_x - g_y).to(p_dgate.dtype.element_ty), mask=valid)
