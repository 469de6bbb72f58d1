# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, assignment"
"""The backward kernel of DCNv3 as products of matrices; see `matrix` for S, layouts and limits.

With the incoming gradient `grad` of one image and group (positions x channels):

    dx = S^T grad
    dS = grad x^T, and with it at the four corners c of point k, whose bilinear weights are w_c:
    dm_k  = sum_c w_c dS_c
    ddx_k = offset_scale * (1 - s) m_k sum_c (dw_c / dx) dS_c, and ddy_k likewise
    ds    = dS_center - sum_k m_k dm_k
    dlogit_k = (1 - s) m_k (dm_k - sum_j m_j dm_j)

So the 4 K dot products over channels are one product on tensor cores and 4 K reads of one float32,
and the 4 K scattered rows of dx one product and one write, the same in every run.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from m3i_kernels.dcnv3.matrix import (
    SCALE,
    STRIDES,
    UNDO,
    add_center,
    add_point,
    clear,
    copy_image,
    exponentials,
    load_bf16,
    load_gate,
    locate,
    pick,
)


@gluon.jit
def _pack_pair(low, high):
    """Round two float32 to bfloat16 and put them into one int32."""
    low = low.to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return low | (high.to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32) << 16)


@gluon.jit
def _point_gradients(
    m_d, q, bilinear, within, WW: gl.constexpr, Q: gl.constexpr,
):  # fmt: skip
    """Derivatives of one point's <grad, sampled value>: by its weight, x and y; all (P, SLOTS)."""
    wy0, wy1, wx0, wx1 = bilinear
    in_y0, in_y1, in_x0, in_x1 = within
    d00 = gl.where(in_x0 & in_y0, m_d.gather(q & (Q - 1), axis=1), 0.0)
    d01 = gl.where(in_x1 & in_y0, m_d.gather((q + 1) & (Q - 1), axis=1), 0.0)
    d10 = gl.where(in_x0 & in_y1, m_d.gather((q + WW) & (Q - 1), axis=1), 0.0)
    d11 = gl.where(in_x1 & in_y1, m_d.gather((q + WW + 1) & (Q - 1), axis=1), 0.0)
    r0 = wx0 * d00 + wx1 * d01
    r1 = wx0 * d10 + wx1 * d11
    return wy0 * r0 + wy1 * r1, wy0 * (d01 - d00) + wy1 * (d11 - d10), r1 - r0


@gluon.jit(do_not_specialize=STRIDES)
def dcnv3_matrix_backward_kernel(
    p_grad, p_x, p_offset, p_mask, p_gate, p_dx, p_doffset, p_dmask, p_dgate,
    s_xn, s_xp, s_on, s_op, s_mn, s_mp, s_gn, s_gp, offset_scale,
    G: gl.constexpr, D: gl.constexpr, H: gl.constexpr, W: gl.constexpr, WW: gl.constexpr,
    Q: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr, DH: gl.constexpr, DW: gl.constexpr,
    GATED: gl.constexpr, P: gl.constexpr, NW: gl.constexpr,
):  # fmt: skip
    """Write the gradients of x, offset (pairs as int32), mask and gate, all contiguous.

    `p_grad` is contiguous (N, H, W, G * D); the rest is as in `dcnv3_matrix_forward_kernel`.
    """
    K: gl.constexpr = KH * KW
    C: gl.constexpr = G * D
    SLOTS: gl.constexpr = 32 * NW // P
    STEPS: gl.constexpr = (K + SLOTS - 1) // SLOTS
    QUSED: gl.constexpr = (H * WW + 15) // 16 * 16
    QC: gl.constexpr = 16 * NW  # pixels of dx per accumulator
    CHUNKS: gl.constexpr = (QUSED + QC - 1) // QC
    L2: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [P // 32, SLOTS], [1, 0])
    LR: gl.constexpr = gl.SliceLayout(1, L2)
    LO: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [NW, 1], [1, 0])
    LK: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [NW, 1], [1, 0])
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [NW, 1], [16, 8])
    LA: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    LB: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
    STAGE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 16, [0, 1])

    pid = gl.program_id(0)
    i_g = pid % G
    i_n = (pid // G).to(gl.int64)
    p_offset += i_n * s_on + i_g * K
    p_mask += i_n * s_mn + i_g * K
    p_gate += i_n * s_gn + i_g
    p_grad += i_n * (H * W * C) + i_g * D
    p_dx += i_n * (H * W * C) + i_g * D
    p_doffset += i_n * (H * W * G * K) + i_g * K
    p_dmask += i_n * (H * W * G * K) + i_g * K
    p_dgate += i_n * (H * W * G) + i_g
    m_x = gl.allocate_shared_memory(gl.bfloat16, [QUSED // 16, 16, D], ROWS)
    copy_image(m_x, p_x + (i_n * s_xn + i_g * D), s_xp, H, W, WW, QUSED, D, NW)

    slot = gl.arange(0, SLOTS, layout=gl.SliceLayout(0, L2))[None, :]
    i_d = gl.arange(0, D, layout=gl.SliceLayout(0, LO))
    i_k = gl.arange(0, 16, layout=gl.SliceLayout(0, LK))[None, :]
    poison = gl.zeros([P], gl.float32, layout=LR)  # NaN where a row has no finite S
    sums = ()
    for _ in gl.static_range(CHUNKS):
        sums = sums + (gl.zeros([QC, D], gl.float32, layout=MMA),)
    for tile in range((H * W + P - 1) // P):
        o_p = tile * P + gl.arange(0, P, layout=gl.SliceLayout(1, LO))
        m_g = gl.allocate_shared_memory(gl.bfloat16, [P, D], ROWS)
        p = p_grad + (o_p * C)[:, None] + i_d[None, :]
        m_g.store(gl.load(p, mask=(o_p < H * W)[:, None], other=0.0))
        i_p = tile * P + gl.arange(0, P, layout=LR)
        i_y = i_p // W
        i_x = i_p - i_y * W
        valid = i_p < H * W
        pairs = ()
        for j in gl.static_range(STEPS):
            k = j * SLOTS + slot
            p = p_offset + ((i_p * s_op)[:, None] + k)
            pairs = pairs + (gl.load(p, mask=valid[:, None] & (k < K), other=0),)
        exps, total = exponentials(p_mask + i_p * s_mp, valid, K)
        inverse = gl.where(valid, 1 / total, 0.0)
        row_poison = gl.where(total > 0, 0.0, float("nan"))
        keep = gl.full([P], 1.0, gl.float32, layout=LR)  # 1 - s
        if GATED:
            gate, gate_poison = load_gate(p_gate + i_p * s_gp, valid)
            row_poison += gate_poison
            keep -= gate
        keep += row_poison
        poison += row_poison

        # dS = grad x^T, and what each point reads of it
        m_d = gl.allocate_shared_memory(
            gl.float32, [P, Q], gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
        )
        async_copy.wait_group(0)
        gl.barrier()
        b_g = m_g.load(LA)
        for q in gl.static_range(0, QUSED, 16):
            b_x = m_x.index(q // 16).permute((1, 0)).load(LB)
            b_d = mma_v2(b_g, b_x, gl.zeros([P, 16], gl.float32, layout=MMA))
            m_d.slice(q, 16, dim=1).store(b_d)
        weights = ()
        dms = ()
        m_o = gl.allocate_shared_memory(gl.int32, [P, 16], STAGE)
        partial = gl.zeros([P, SLOTS], gl.float32, layout=L2)
        for j in gl.static_range(STEPS):
            k = j * SLOTS + slot
            q, bilinear, within = locate(
                pairs[j], k, i_y[:, None], i_x[:, None], offset_scale, H, W, WW, KH, KW, DH, DW
            )
            dm, ddx, ddy = _point_gradients(m_d, q, bilinear, within, WW, Q)
            m = pick(exps, j, slot, K, SLOTS) * inverse[:, None]
            h = offset_scale * (m * keep[:, None])
            m_o.scatter(_pack_pair(h * ddx, h * ddy), k, axis=1)
            partial += m * dm
            weights = weights + (m,)
            dms = dms + (dm,)
        if GATED:
            g_x = m_d.gather(((i_y * WW + i_x) & (Q - 1))[:, None], axis=1)
        g_y = gl.sum(partial, axis=1)
        k_p = tile * P + gl.arange(0, P, layout=gl.SliceLayout(1, LK))
        o_k = (k_p * (G * K))[:, None] + i_k
        stored = (k_p < H * W)[:, None] & (i_k < K)
        gl.store(p_doffset + o_k, m_o.load(LK), mask=stored)
        m_m = gl.allocate_shared_memory(gl.float32, [P, 16], STAGE)
        for j in gl.static_range(STEPS):
            dlogit = weights[j] * (dms[j] - g_y[:, None]) * keep[:, None]
            m_m.scatter(dlogit, j * SLOTS + slot, axis=1)
        gl.store(p_dmask + o_k, m_m.load(LK).to(gl.bfloat16), mask=stored)
        if GATED:
            dgate = g_x - g_y[:, None] + row_poison[:, None]
            gl.store(p_dgate + (i_p * G)[:, None], dgate.to(gl.bfloat16), mask=valid[:, None])

        # dx += S^T grad
        m_w = gl.allocate_shared_memory(
            gl.int32, [P, Q // 2], gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
        )
        m_s = m_w._reinterpret(gl.int16, [P, Q], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
        clear(m_w, P, QUSED, NW)
        for j in gl.static_range(STEPS):
            q, bilinear, within = locate(
                pairs[j], j * SLOTS + slot, i_y[:, None], i_x[:, None], offset_scale,
                H, W, WW, KH, KW, DH, DW,
            )  # fmt: skip
            h = weights[j] * (keep[:, None] * SCALE)
            add_point(m_w, h, q, bilinear, WW, Q, P, SLOTS, NW)
        if GATED:
            add_center(m_w, gl.where(valid, gate, 0.0), i_y, i_x, slot, WW, Q)
        b_g = m_g.load(LB)
        new = ()
        for i in gl.static_range(CHUNKS):
            b_s = load_bf16(m_s.slice(i * QC, QC, dim=1).permute((1, 0)), LA)
            new = new + (mma_v2(b_s, b_g, sums[i]),)
        sums = new

    undo = UNDO + gl.sum(poison, axis=0)
    for i in gl.static_range(CHUNKS):
        b_dx = gl.convert_layout((sums[i] * undo).to(gl.bfloat16), LO)
        i_q = i * QC + gl.arange(0, QC, layout=gl.SliceLayout(1, LO))
        y = i_q // WW
        x = i_q % WW
        p = p_dx + ((y * W + x) * C)[:, None] + i_d[None, :]
        gl.store(p, b_dx, mask=((y < H) & (x < W))[:, None])
