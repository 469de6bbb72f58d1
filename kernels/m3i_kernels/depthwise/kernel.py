# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"
"""Triton kernels of a depthwise convolution, and of LayerNorm and GELU after it.

With a K x K kernel w, zeros outside the image and r = K // 2, for every channel c

    z(y, x)    = bias + sum_ij  w_ij * a(y + i - r, x + j - r)
    dw_ij      = sum_yx  dz(y, x) * a(y + i - r, x + j - r)
    da(y, x)   = sum_ij  w_ij * dz(y - i + r, x - j + r)          the same with w turned around

and over the C channels, with n = (z - mean) / sqrt(var + eps) and u = gamma n + beta,

    result     = u * cdf(u)                                       cdf, pdf of the standard normal
    du         = dresult * (cdf(u) + u * pdf(u))
    dgamma     = sum du * n,   dbeta = sum du
    dz         = (gamma du - mean(gamma du) - n * mean(gamma du n)) / sqrt(var + eps)

Convolutions: a program owns BLOCK_R strips of STRIP neighbouring output columns, and BLOCK_C
channels. A loaded pixel serves all outputs of its strip, which takes the loads and conversions of
25 products down to 10. Normalisation: a program owns rows of all C channels, as a tile of the
largest power of two within C and one of the rest, since widths such as 5 * 2^n would leave three
eighths of one tile idle. Prefixes: p_ pointer, s_ stride in elements, b_ tile of values, i_ index.
"""

import triton
import triton.language as tl

# Image sizes vary from call to call: one compilation serves them all.
_SIZES = ["H", "W", "strips", "rows"]


@triton.jit
def _strips(i_s, strips, H, W, STRIP: tl.constexpr):
    """Locate strips i_s: (image int64, row, first column, valid)."""
    valid = i_s < strips
    per_row = (W + STRIP - 1) // STRIP
    i_line = i_s // per_row
    i_n = i_line // H
    i_y = (i_line - i_n * H).to(tl.int32)
    i_x = (i_s - i_line * per_row).to(tl.int32) * STRIP
    return i_n.to(tl.int64), i_y, i_x, valid


@triton.jit
def _pixel(p_row, i_x, W, stride, in_row, i_c, C: tl.constexpr, FULL: tl.constexpr):
    """Read channels i_c of column i_x of every row as float32, zero outside."""
    inside = in_row & (i_x >= 0) & (i_x < W)
    p = p_row + i_x.to(tl.int64) * stride
    mask = inside[:, None]
    if not FULL:
        mask = mask & (i_c < C)[None, :]
    return tl.load(p[:, None] + i_c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _add_taps(b_z, b_w, v, j: tl.constexpr, K: tl.constexpr, STRIP: tl.constexpr):
    """Add input column j of a strip to its outputs, of which number p sees it through tap j - p."""
    out = ()
    for p in tl.static_range(STRIP):
        if j >= p and j - p < K:
            out += (b_z[p] + b_w[j - p] * v,)
        else:
            out += (b_z[p],)
    return out


@triton.jit(do_not_specialize=_SIZES)
def depthwise_kernel(
    p_x, p_weight, p_bias, p_z, s_n, s_h, s_w, H, W, strips,
    C: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, STRIP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write z, contiguous (N, H, W, C), from x (N, H, W, C) and weights (K * K, C)."""
    tiles_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    FULL: tl.constexpr = C % BLOCK_C == 0
    pid = tl.program_id(0)
    i_c = (pid % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_s = (pid // tiles_c).to(strips.dtype) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_n, i_y, i_x, valid = _strips(i_s, strips, H, W, STRIP)
    in_c = i_c < C
    b = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if BIAS:
        b += tl.load(p_bias + i_c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    b_z = ()
    for _ in tl.static_range(STRIP):
        b_z += (b,)
    for i in tl.range(K):
        b_w = ()
        for j in tl.static_range(K):
            w = tl.load(p_weight + (i * K + j) * C + i_c, mask=in_c, other=0.0)
            b_w += (w.to(tl.float32)[None, :],)
        y = i_y + i - K // 2
        in_row = valid & (y >= 0) & (y < H)
        p_row = p_x + i_n * s_n + y.to(tl.int64) * s_h
        for j in tl.static_range(STRIP + K - 1):
            v = _pixel(p_row, i_x + (j - K // 2), W, s_w, in_row, i_c, C, FULL)
            b_z = _add_taps(b_z, b_w, v, j, K, STRIP)
    p_out = p_z + ((i_n * H + i_y) * W + i_x) * C
    for p in tl.static_range(STRIP):
        mask = (valid & (i_x + p < W))[:, None] & in_c[None, :]
        tl.store(
            (p_out + p * C)[:, None] + i_c[None, :], b_z[p].to(p_z.dtype.element_ty), mask=mask
        )


@triton.jit
def _add_products(b_dw, b_dz, v, j: tl.constexpr, K: tl.constexpr, STRIP: tl.constexpr):
    """Add input column j of a strip to the gradients of the taps through which outputs see it."""
    out = ()
    for t in tl.static_range(K):
        if j >= t and j - t < STRIP:
            out += (b_dw[t] + b_dz[j - t] * v,)
        else:
            out += (b_dw[t],)
    return out


@triton.jit(do_not_specialize=_SIZES)
def depthwise_weight_kernel(
    p_x, p_dz, p_partial, s_n, s_h, s_w, H, W, strips,
    C: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, STRIP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write partial sums (SPLITS, K * K + 1, C) of the gradients of the weights and the bias.

    A program sums one row of taps over every SPLITS-th tile of strips, always in the same order.
    """
    tiles_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    FULL: tl.constexpr = C % BLOCK_C == 0
    pid = tl.program_id(0)
    i = pid % K  # neighbours read the same strips of dz
    i_c = (pid // K % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = pid // (K * tiles_c)
    in_c = i_c < C
    b_dbias = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    b_dw = ()
    for _ in tl.static_range(K):
        b_dw += (b_dbias,)
    for tile in tl.range(split, tl.cdiv(strips, BLOCK_R), SPLITS):
        i_s = (tile + tl.zeros((BLOCK_R,), strips.dtype)) * BLOCK_R + tl.arange(0, BLOCK_R)
        i_n, i_y, i_x, valid = _strips(i_s, strips, H, W, STRIP)
        p_row = p_dz + (i_n * H + i_y) * W * C
        b_dz = ()
        for p in tl.static_range(STRIP):
            g = _pixel(p_row, i_x + p, W, C, valid, i_c, C, FULL)
            b_dz += (g,)
            b_dbias += g
        y = i_y + i - K // 2
        in_row = valid & (y >= 0) & (y < H)
        p_row = p_x + i_n * s_n + y.to(tl.int64) * s_h
        for j in tl.static_range(STRIP + K - 1):
            v = _pixel(p_row, i_x + (j - K // 2), W, s_w, in_row, i_c, C, FULL)
            b_dw = _add_products(b_dw, b_dz, v, j, K, STRIP)
    p_out = p_partial + split.to(tl.int64) * ((K * K + 1) * C) + i_c
    for j in tl.static_range(K):
        tl.store(p_out + (i * K + j) * C, tl.sum(b_dw[j], axis=0), mask=in_c)
    if i == 0:
        tl.store(p_out + K * K * C, tl.sum(b_dbias, axis=0), mask=in_c)


@triton.jit
def _read(p, o_row, i_c, valid, C: tl.constexpr):
    """Read channels i_c of every row as float32, zero beyond."""
    mask = valid[:, None] & (i_c < C)[None, :]
    return tl.load(p + o_row[:, None] + i_c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _read_affine(p_gamma, p_beta, i_c, C: tl.constexpr):
    gamma = tl.load(p_gamma + i_c, mask=i_c < C, other=0.0).to(tl.float32)
    beta = tl.load(p_beta + i_c, mask=i_c < C, other=0.0).to(tl.float32)
    return gamma[None, :], beta[None, :]


@triton.jit
def _normalise(p_z, o_row, i_c, i_e, valid, eps, C: tl.constexpr, TAIL: tl.constexpr):
    """Read and normalise rows: (n of channels i_c, n of channels i_e, 1 / deviation)."""
    b = _read(p_z, o_row, i_c, valid, C)
    e = b
    total = tl.sum(b, axis=1)
    if TAIL:
        e = _read(p_z, o_row, i_e, valid, C)
        total += tl.sum(e, axis=1)
    mean = (total / C)[:, None]
    b -= mean
    squares = tl.sum(b * b, axis=1)
    if TAIL:
        e = tl.where((i_e < C)[None, :], e - mean, 0.0)
        squares += tl.sum(e * e, axis=1)
    scale = (1 / tl.sqrt(squares / C + eps))[:, None]
    return b * scale, e * scale, scale


@triton.jit
def _cdf(u):
    return 0.5 + 0.5 * tl.erf(u * 0.7071067811865476)


@triton.jit
def _write(p, o_row, i_c, b, valid, C: tl.constexpr):
    mask = valid[:, None] & (i_c < C)[None, :]
    tl.store(p + o_row[:, None] + i_c[None, :], b.to(p.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def norm_gelu_kernel(
    p_z, p_gamma, p_beta, p_y, rows, eps,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Write gelu(layer_norm(z)); z and y contiguous (rows, C), BLOCK_C <= C <= BLOCK_C + TAIL."""
    i_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = i_r < rows
    o_row = i_r * C
    i_c = tl.arange(0, BLOCK_C)
    i_e = BLOCK_C + tl.arange(0, TAIL if TAIL else 1)
    n, e, _ = _normalise(p_z, o_row, i_c, i_e, valid, eps, C, TAIL)
    gamma, beta = _read_affine(p_gamma, p_beta, i_c, C)
    u = gamma * n + beta
    _write(p_y, o_row, i_c, u * _cdf(u), valid, C)
    if TAIL:
        gamma, beta = _read_affine(p_gamma, p_beta, i_e, C)
        u = gamma * e + beta
        _write(p_y, o_row, i_e, u * _cdf(u), valid, C)


@triton.jit
def _gradient_of_u(n, gamma, beta, dy):
    u = gamma * n + beta
    return dy * (_cdf(u) + u * 0.3989422804014327 * tl.exp(-0.5 * u * u))


@triton.jit(do_not_specialize=_SIZES)
def norm_gelu_backward_kernel(
    p_dy, p_z, p_gamma, p_beta, p_dz, p_partial, rows, eps,
    C: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Write dz, and partial sums (PROGRAMS, 2, C) of the gradients of gamma and beta.

    A program goes over every PROGRAMS-th tile of rows, always in the same order.
    """
    pid = tl.program_id(0)
    i_c = tl.arange(0, BLOCK_C)
    i_e = BLOCK_C + tl.arange(0, TAIL if TAIL else 1)
    gamma, beta = _read_affine(p_gamma, p_beta, i_c, C)
    gamma_e, beta_e = _read_affine(p_gamma, p_beta, i_e, C)
    dgamma = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    dbeta = dgamma
    dgamma_e = tl.zeros((BLOCK_R, TAIL if TAIL else 1), tl.float32)
    dbeta_e = dgamma_e
    for tile in tl.range(pid, tl.cdiv(rows, BLOCK_R), PROGRAMS):
        i_r = (tile + tl.zeros((BLOCK_R,), tl.int64)) * BLOCK_R + tl.arange(0, BLOCK_R)
        valid = i_r < rows
        o_row = i_r * C
        n, e, scale = _normalise(p_z, o_row, i_c, i_e, valid, eps, C, TAIL)
        du = _gradient_of_u(n, gamma, beta, _read(p_dy, o_row, i_c, valid, C))
        dgamma += du * n
        dbeta += du
        du *= gamma
        first, second = tl.sum(du, axis=1), tl.sum(du * n, axis=1)
        if TAIL:
            du_e = _gradient_of_u(e, gamma_e, beta_e, _read(p_dy, o_row, i_e, valid, C))
            dgamma_e += du_e * e
            dbeta_e += du_e
            du_e *= gamma_e
            first += tl.sum(du_e, axis=1)
            second += tl.sum(du_e * e, axis=1)
        first, second = (first / C)[:, None], (second / C)[:, None]
        _write(p_dz, o_row, i_c, (du - first - n * second) * scale, valid, C)
        if TAIL:
            _write(p_dz, o_row, i_e, (du_e - first - e * second) * scale, valid, C)
    p_out = p_partial + pid.to(tl.int64) * (2 * C)
    tl.store(p_out + i_c, tl.sum(dgamma, axis=0), mask=i_c < C)
    tl.store(p_out + C + i_c, tl.sum(dbeta, axis=0), mask=i_c < C)
    if TAIL:
        tl.store(p_out + i_e, tl.sum(dgamma_e, axis=0), mask=i_e < C)
        tl.store(p_out + C + i_e, tl.sum(dbeta_e, axis=0), mask=i_e < C)
