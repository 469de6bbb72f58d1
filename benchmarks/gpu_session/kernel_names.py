"""What a kernel does, from the name that the profiler gives it."""

from __future__ import annotations

import re

_DTYPES = ("BFloat16", "Half", "float", "double", "long", "int", "bool")
# What stands in template arguments around the operator.
_MACHINERY = {
    "anonymous", "namespace", "at", "native", "c10", "std", "cub", "thrust", "cutlass", "internal",
    "binary_internal", "unsigned", "char", "true", "false", "const", "lambda", "operator", "array",
    "gpu_kernel_impl", "gpu_kernel_impl_nocast", "BinaryFunctor", "AUnaryFunctor", "BUnaryFunctor",
    "ReduceOp", "func_wrapper_t", "TensorIteratorBase", "TensorIterator", "TensorListMetadata",
    "FusedOptimizerTensorListMetadata", "TensorListScalarListMetadata",
    "TrivialOffsetCalculator", "OffsetCalculator", *_DTYPES,
}  # fmt: skip


def short(name: str) -> str:
    """Kernel, operator and first data type of a C++ name; others stay as they are.

    `void at::native::elementwise_kernel<128, 4, ...CUDAFunctor_add<c10::BFloat16>...>(...)` becomes
    `elementwise_kernel CUDAFunctor_add BFloat16`. `elementwise_kernel` is the slow kind, for
    strides and broadcasts; `vectorized_elementwise_kernel` the fast one, for dense tensors.
    """
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    head = re.match(r"[\w:]+", plain)
    if head is None:
        return name
    kernel = head.group().split("::")[-1]
    rest = plain[head.end() :]
    words = re.findall(r"\b[A-Za-z_]\w*", _first_argument_list(rest)) if rest[:1] == "<" else []
    operator = next((w for w in words if w not in _MACHINERY), "")
    dtype = next((w for w in words if w in _DTYPES), "")
    return " ".join(part for part in (kernel, operator, dtype) if part)


def _first_argument_list(text: str) -> str:
    depth = 0
    for at, character in enumerate(text):
        depth += (character == "<") - (character == ">")
        if depth == 0:
            return text[1:at]
    return text[1:]  # the name was cut
