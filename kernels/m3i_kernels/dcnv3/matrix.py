# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, assignment"
"""DCNv3 as products of matrices, in Gluon: shared device functions and the forward kernel.

For one image and group the operator is linear in the pixels, y = S x: row p of the sampling matrix
S (positions x pixels) holds the summed bilinear weights of position p, each times its softmax
weight, and the centre blend `(1 - s) * y + s * x` is one more entry. A map of at most 256 pixels
lies in shared memory whole, so any offset is right and no corner is read from global memory twice.

    place     SLOTS threads own a row. They compute its K locations once (not once per channel) and
              add the 4 K weights to the row with integer atomics of shared memory.
    multiply  bf16(S) times x on tensor cores, accumulated in float32.

S is unsigned 16-bit fixed point, two neighbouring pixels in a 32-bit word. Its rows are
non-negative and sum to at most one (softmax weights, s in [0, 1]), so nothing overflows into the
neighbour, and integer sums do not depend on their order: results are the same in every run.

What differs from the gather kernel, where values are not finite or not in range:

    x         0 * inf is NaN: a non-finite pixel makes its channel of y NaN in its whole image
    gradient  likewise: its channel of the gradient of x is NaN in its whole image
    logits,   a logit that is NaN or +inf, K logits of -inf, or a gate s outside [0, 1] make the
    gate      position's y and gradients NaN, and the gradient of x of its image and group
    offset    as there: a location that is not finite reads nothing

Prefixes: p_ pointer, s_ stride in elements (n: image, p: position), m_ shared memory, b_ tile of
values, i_ index.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

if hasattr(gl.shared_memory_descriptor, "reinterpret"):  # private in Triton 3.8, public from 3.9
    gl.shared_memory_descriptor._reinterpret = gl.shared_memory_descriptor.reinterpret

SCALE = gl.constexpr(65408.0)  # units per 1.0: 65535 less the roundings of 4 K + 1 additions
UNDO = gl.constexpr(1 / 65408.0 / 65536.0)  # of SCALE and of `load_bf16`
MAGIC = gl.constexpr(8388608.0)  # 2^23: a float32 whose low mantissa bits are the integer added
LOG2E = gl.constexpr(1.4426950408889634)
STRIDES = ["s_on", "s_op", "s_mn", "s_mp", "s_gn", "s_gp"]  # one compilation serves them all


@gluon.jit
def load_bf16(m_s, layout: gl.constexpr):
    """Read unsigned 16-bit numbers as bfloat16, times 65536.

    The upper of two keeps the lower as its fraction: an error of less than one unit.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 t; .reg .f32 a, b;
        shl.b32 t, $1, 16;
        cvt.rn.f32.u32 a, t;
        cvt.rn.f32.u32 b, $1;
        cvt.rn.bf16x2.f32 $0, b, a;
        }""",
        "=r,r", [m_s.load(layout)], dtype=gl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def _merge(v0, v1, selector):
    """Pick bytes of two float32 `MAGIC + integer`: 0, 1 and 4, 5 the integers, 2 and 6 zero."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [v0, v1, selector],
        dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def inside(i, size: gl.constexpr):
    """Tell where 0 <= i < size, in one comparison."""
    return i.to(gl.uint32, bitcast=True) < size


@gluon.jit
def copy_image(
    m_x, p_x, s_xp,
    H: gl.constexpr, W: gl.constexpr, WW: gl.constexpr, QUSED: gl.constexpr,
    D: gl.constexpr, NW: gl.constexpr,
):  # fmt: skip
    """Start copying an image to shared memory (QUSED / 16, 16, D): rows of WW, zero beyond."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [NW, 1], [1, 0])
    i_d = gl.arange(0, D, layout=gl.SliceLayout(0, L))
    for r in gl.static_range(QUSED // 16):
        i_q = r * 16 + gl.arange(0, 16, layout=gl.SliceLayout(1, L))
        i_y = i_q // WW
        i_x = i_q % WW
        p = p_x + ((i_y * W + i_x) * s_xp)[:, None] + i_d[None, :]
        async_copy.async_load(m_x.index(r), p, mask=((i_y < H) & (i_x < W))[:, None])
    async_copy.commit_group()


@gluon.jit
def exponentials(p_logits, valid, K: gl.constexpr):
    """Softmax numerators of every row as a tuple of K tensors (P,), and their sum."""
    logits = ()
    for k in gl.static_range(K):
        logits = logits + (gl.load(p_logits + k, mask=valid, other=0.0).to(gl.float32),)
    largest = logits[0]
    for k in gl.static_range(1, K):
        largest = gl.maximum(largest, logits[k])
    total = gl.zeros_like(largest)
    exps = ()
    for k in gl.static_range(K):
        e = gl.exp2((logits[k] - largest) * LOG2E)
        exps = exps + (e,)
        total += e
    return exps, total


@gluon.jit
def pick(columns, j: gl.constexpr, slot, K: gl.constexpr, SLOTS: gl.constexpr):
    """Column `j * SLOTS + slot` of K columns (P,) as (P, SLOTS), zero from K on."""
    b = columns[j * SLOTS][:, None] + gl.zeros_like(slot).to(columns[0].dtype)
    for i in gl.static_range(1, SLOTS):
        if j * SLOTS + i < K:
            b = gl.where(slot == i, columns[j * SLOTS + i][:, None], b)
        else:
            b = gl.where(slot == i, 0.0, b)
    return b


@gluon.jit
def load_gate(p_gate, valid):
    """Read the gate s of every row; also NaN where it is outside [0, 1], else zero."""
    gate = gl.load(p_gate, mask=valid, other=0.0).to(gl.float32)
    return gate, gl.where((gate >= 0) & (gate <= 1), 0.0, float("nan"))


@gluon.jit
def locate(
    pair, k, i_y, i_x, offset_scale,
    H: gl.constexpr, W: gl.constexpr, WW: gl.constexpr,
    KH: gl.constexpr, KW: gl.constexpr, DH: gl.constexpr, DW: gl.constexpr,
):  # fmt: skip
    """Place point k: pixel index q of its top left corner, and weights of its rows and columns.

    `pair` holds (dx, dy) as bfloat16. Returns q, the bilinear weights (wy0, wy1, wx0, wx1) of the
    upper and lower row and the left and right column, zero where these are outside the image, and
    whether each is inside.
    """
    dx = (pair << 16).to(gl.float32, bitcast=True)
    dy = (pair & -65536).to(gl.float32, bitcast=True)
    l_x = i_x.to(gl.float32) + offset_scale * (((k // KH - KW // 2) * DW).to(gl.float32) + dx)
    l_y = i_y.to(gl.float32) + offset_scale * (((k % KH - KH // 2) * DH).to(gl.float32) + dy)
    # Beyond one pixel outside the image nothing is read; NaN becomes -2 as well.
    l_x = gl.minimum(gl.maximum(l_x, -2.0), W + 1.0)
    l_y = gl.minimum(gl.maximum(l_y, -2.0), H + 1.0)
    f_x = gl.floor(l_x)
    f_y = gl.floor(l_y)
    x0 = f_x.to(gl.int32)
    y0 = f_y.to(gl.int32)
    tx = l_x - f_x
    ty = l_y - f_y
    in_y0 = inside(y0, H)
    in_y1 = inside(y0 + 1, H)
    in_x0 = inside(x0, W)
    in_x1 = inside(x0 + 1, W)
    bilinear = (
        gl.where(in_y0, 1 - ty, 0.0),
        gl.where(in_y1, ty, 0.0),
        gl.where(in_x0, 1 - tx, 0.0),
        gl.where(in_x1, tx, 0.0),
    )
    return y0 * WW + x0, bilinear, (in_y0, in_y1, in_x0, in_x1)


@gluon.jit
def clear(m_w, P: gl.constexpr, QUSED: gl.constexpr, NW: gl.constexpr):
    """Set the used words of S to zero."""
    L: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [NW, 1], [1, 0])
    for q in gl.static_range(0, QUSED, 32):
        m_w.slice(q // 2, 16, dim=1).store(gl.full([P, 16], 0, gl.int32, layout=L))


@gluon.jit
def add_point(
    m_w, h, q, bilinear,
    WW: gl.constexpr, Q: gl.constexpr, P: gl.constexpr, SLOTS: gl.constexpr, NW: gl.constexpr,
):  # fmt: skip
    """Add weight h of one point to pixels q, q + 1, q + WW, q + WW + 1 of every row of S.

    All are (P, SLOTS); h is in units of 1 / SCALE. Pixels q and q + 1 of an even q share a word,
    and zero is added to the next; an odd q is the upper half of one word and q + 1 the lower half
    of the next. The four adds are one operation, so that no barrier is put between them.
    """
    L: gl.constexpr = gl.BlockedLayout([1, 1, 4], [32, 1, 1], [P // 32, SLOTS, 1], [2, 1, 0])
    LS: gl.constexpr = gl.SliceLayout(2, L)
    magic = MAGIC + gl.zeros_like(h)
    wy0, wy1, wx0, wx1 = bilinear
    a = h * wy0
    b = h * wy1
    v00 = gl.convert_layout(gl.fma(a, wx0, magic), LS, assert_trivial=True)[:, :, None]
    v01 = gl.convert_layout(gl.fma(a, wx1, magic), LS, assert_trivial=True)[:, :, None]
    v10 = gl.convert_layout(gl.fma(b, wx0, magic), LS, assert_trivial=True)[:, :, None]
    v11 = gl.convert_layout(gl.fma(b, wx1, magic), LS, assert_trivial=True)[:, :, None]
    q = gl.convert_layout(q, LS, assert_trivial=True)[:, :, None]
    i_c = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    odd = (q & 1) != 0
    first = gl.where(odd, 0x1022, 0x5410)
    second = gl.where(odd, 0x6654, 0x6666)
    v0 = gl.where(i_c < 2, v00, v10)
    v1 = gl.where(i_c < 2, v01, v11)
    v = _merge(v0, v1, gl.where((i_c & 1) == 0, first, second))
    word = (q >> 1) + ((i_c & 1) + (i_c >> 1) * (WW // 2))
    word = (word & (Q // 2 - 1)).reshape([P, 4 * SLOTS])
    m_w.atomic_scatter_add(v.reshape([P, 4 * SLOTS]), word, axis=1)


@gluon.jit
def add_center(m_w, gate, i_y, i_x, slot, WW: gl.constexpr, Q: gl.constexpr):
    """Add the gate to the centre pixel of every row of S."""
    q = i_y * WW + i_x
    v = gl.fma(gate, SCALE + gl.zeros_like(gate), MAGIC + gl.zeros_like(gate))
    v = _merge(v, v, gl.where((q & 1) != 0, 0x1022, 0x2210))[:, None]
    v = gl.where(slot == 0, v, 0)
    word = ((q >> 1) & (Q // 2 - 1))[:, None] + gl.zeros_like(slot)
    m_w.atomic_scatter_add(v, word, axis=1)


@gluon.jit(do_not_specialize=STRIDES)
def dcnv3_matrix_forward_kernel(
    p_x, p_offset, p_mask, p_gate, p_y,
    s_xn, s_xp, s_on, s_op, s_mn, s_mp, s_gn, s_gp, offset_scale,
    G: gl.constexpr, D: gl.constexpr, H: gl.constexpr, W: gl.constexpr, WW: gl.constexpr,
    Q: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr, DH: gl.constexpr, DW: gl.constexpr,
    GATED: gl.constexpr, P: gl.constexpr, NW: gl.constexpr,
):  # fmt: skip
    """Write y (N, H, W, G * D), one image and group per program, P positions at a time.

    `p_offset` points to pairs of bfloat16 read as int32, and its strides count pairs. WW is W
    rounded up to even, and Q a power of two of at least H * WW pixels. NW is the number of warps.
    """
    K: gl.constexpr = KH * KW
    SLOTS: gl.constexpr = 32 * NW // P
    STEPS: gl.constexpr = (K + SLOTS - 1) // SLOTS
    QUSED: gl.constexpr = (H * WW + 15) // 16 * 16
    L2: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [P // 32, SLOTS], [1, 0])
    LO: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [NW, 1], [1, 0])
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [NW, 1], [16, 8])
    m_w = gl.allocate_shared_memory(gl.int32, [P, Q // 2], gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))
    m_s = m_w._reinterpret(gl.int16, [P, Q], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    m_x = gl.allocate_shared_memory(
        gl.bfloat16, [QUSED // 16, 16, D], gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
    )

    pid = gl.program_id(0)
    i_g = pid % G
    i_n = (pid // G).to(gl.int64)
    p_offset += i_n * s_on + i_g * K
    p_mask += i_n * s_mn + i_g * K
    p_gate += i_n * s_gn + i_g
    p_y += i_n * (H * W * G * D) + i_g * D
    copy_image(m_x, p_x + (i_n * s_xn + i_g * D), s_xp, H, W, WW, QUSED, D, NW)

    slot = gl.arange(0, SLOTS, layout=gl.SliceLayout(0, L2))[None, :]
    i_d = gl.arange(0, D, layout=gl.SliceLayout(0, LO))
    for tile in range((H * W + P - 1) // P):
        i_p = tile * P + gl.arange(0, P, layout=gl.SliceLayout(1, L2))
        i_y = i_p // W
        i_x = i_p - i_y * W
        valid = i_p < H * W
        pairs = ()
        for j in gl.static_range(STEPS):
            k = j * SLOTS + slot
            p = p_offset + ((i_p * s_op)[:, None] + k)
            pairs = pairs + (gl.load(p, mask=valid[:, None] & (k < K), other=0),)
        exps, total = exponentials(p_mask + i_p * s_mp, valid, K)
        unit = gl.where(valid, SCALE / total, 0.0)
        factor = UNDO + gl.where(total > 0, 0.0, float("nan"))
        clear(m_w, P, QUSED, NW)
        if GATED:
            gate, poison = load_gate(p_gate + i_p * s_gp, valid)
            unit *= 1 - gate
            factor += poison
            add_center(m_w, gate, i_y, i_x, slot, WW, Q)
        for j in gl.static_range(STEPS):
            q, bilinear, _ = locate(
                pairs[j], j * SLOTS + slot, i_y[:, None], i_x[:, None], offset_scale,
                H, W, WW, KH, KW, DH, DW,
            )  # fmt: skip
            h = pick(exps, j, slot, K, SLOTS) * unit[:, None]
            add_point(m_w, h, q, bilinear, WW, Q, P, SLOTS, NW)

        async_copy.wait_group(0)
        gl.barrier()
        b_y = gl.zeros([P, D], gl.float32, layout=MMA)
        for q in gl.static_range(0, QUSED, 16):
            b_s = load_bf16(m_s.slice(q, 16, dim=1), gl.DotOperandLayout(0, MMA, 2))
            b_y = mma_v2(b_s, m_x.index(q // 16).load(gl.DotOperandLayout(1, MMA, 2)), b_y)
        b_y *= gl.convert_layout(factor, gl.SliceLayout(1, MMA))[:, None]
        b_y = gl.convert_layout(b_y.to(gl.bfloat16), LO)
        o_p = tile * P + gl.arange(0, P, layout=gl.SliceLayout(1, LO))
        p = p_y + (o_p * (G * D))[:, None] + i_d[None, :]
        gl.store(p, b_y, mask=(o_p < H * W)[:, None])
