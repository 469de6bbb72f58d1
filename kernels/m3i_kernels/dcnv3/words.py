# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"
"""Arithmetic on words: two bfloat16 ("bf16") or float16 ("f16") numbers in 32 bits.

NVIDIA GPUs of compute capability 8.0 or later multiply and add both numbers of a word in one
instruction (HFMA2). Triton's compiler does not form it from products of 16-bit tensors, which it
computes in float32 for bfloat16, so with PTX it is asked for by name. Without PTX (in Triton's
interpreter, which knows no PTX) the same is computed in float32 and rounded: the same bits but
where rounding to float32 comes to the middle between two 16-bit numbers.
"""

import triton
import triton.language as tl


@triton.jit
def unpacked(b, WORDS: tl.constexpr):
    """Both numbers of every word, (lower, upper), as float32.

    Taking bfloat16 apart by hand costs one instruction a number; the compiler's conversion of
    16-bit values costs one and a half.
    """
    if WORDS == "bf16":
        return (b << 16).to(tl.float32, bitcast=True), (b & -65536).to(tl.float32, bitcast=True)
    else:  # noqa: RET505  without it the compiler would see two kinds of result
        low = b.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return low, (b >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def packed(low, high, WORDS: tl.constexpr):
    """Round two float32 tensors and make words of them."""
    return _bits(low, WORDS) | (_bits(high, WORDS) << 16)


@triton.jit
def _bits(b, WORDS: tl.constexpr):
    if WORDS == "bf16":
        return b.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    else:  # noqa: RET505  as above
        return b.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def pair_of(w, WORDS: tl.constexpr, PTX: tl.constexpr):
    """Round float32 w (R,) to 16 bits and write it into both halves of a word."""
    if PTX:
        if WORDS == "bf16":
            return tl.inline_asm_elementwise(
                "cvt.rn.bf16x2.f32 $0, $1, $1;", "=r,r", [w], tl.int32, is_pure=True, pack=1
            )
        else:  # noqa: RET505  as above
            return tl.inline_asm_elementwise(
                "cvt.rn.f16x2.f32 $0, $1, $1;", "=r,r", [w], tl.int32, is_pure=True, pack=1
            )
    else:
        b = _rounded(w, WORDS)
        return b | (b << 16)


@triton.jit
def first_corner(w, v, WORDS: tl.constexpr, PTX: tl.constexpr):
    """w * v of words, rounded once."""
    # Negative zeros, which change no product; a constant operand costs no instruction.
    return next_corner(w, v, tl.full(v.shape, -2147450880, tl.int32), WORDS, PTX)


@triton.jit
def next_corner(w, v, c, WORDS: tl.constexpr, PTX: tl.constexpr):
    """w * v + c of words, rounded once; w (R, 1) a pair of equal numbers."""
    w, v = tl.broadcast(w, v)
    if PTX:
        if WORDS == "bf16":
            return tl.inline_asm_elementwise(
                "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [w, v, c], tl.int32,
                is_pure=True, pack=1,
            )  # fmt: skip
        else:  # noqa: RET505  as above
            return tl.inline_asm_elementwise(
                "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [w, v, c], tl.int32,
                is_pure=True, pack=1,
            )  # fmt: skip
    else:
        w_low, w_high = unpacked(w, WORDS)
        v_low, v_high = unpacked(v, WORDS)
        c_low, c_high = unpacked(c, WORDS)
        high = _rounded(w_high * v_high + c_high, WORDS)
        return _rounded(w_low * v_low + c_low, WORDS) | (high << 16)


@triton.jit
def _rounded(b, WORDS: tl.constexpr):
    """Round float32 to nearest, ties to even; the bits in the lower half of an int32.

    By hand for bfloat16, to which the interpreter's conversion truncates.
    """
    if WORDS == "bf16":
        bits = b.to(tl.int32, bitcast=True)
        bits += tl.where(b == b, 0x7FFF + ((bits >> 16) & 1), 0)  # no carry out of a NaN
        return (bits >> 16) & 0xFFFF
    else:  # noqa: RET505  as above
        return _bits(b, WORDS)
