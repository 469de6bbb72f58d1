"""Triton's interpreter for kernels that are imported from here on, and DCNv3's matrix kernels."""

import importlib
import os
import sys
from typing import Any

import triton
from packaging.version import Version

from helpers.gluon_emulator import Emulated, emulated


def interpret() -> None:
    """Have every kernel interpreted that is defined from here on.

    Triton decides when a function is decorated. Its own library of functions, `tl.sum` and others,
    was decorated when torch imported Triton, so those are decorated again.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    _mend_bounds_of_loops()
    for module in [m for name, m in sys.modules.items() if name.startswith("triton.language")]:
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, InterpretedFunction(value.fn))


def _mend_bounds_of_loops() -> None:
    """Before Triton 3.8 they are made integers in a way that numpy 2.5 no longer allows."""
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang_tensor", None)
    if patch is None or Version(triton.__version__) >= Version("3.8"):
        return

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def emulated_matrix_kernels() -> dict[str, Any]:
    """DCNv3's matrix kernels as `matrix_op.kernels` returns them, on the CPU."""
    names = [f"m3i_kernels.dcnv3.{name}" for name in ("matrix", "matrix_backward")]
    real = {name: sys.modules.pop(name, None) for name in names}
    with emulated():
        forward, backward = (importlib.import_module(name) for name in names)
    for name, module in real.items():
        del sys.modules[name]
        if module is not None:
            sys.modules[name] = module
    return {
        "forward": Emulated(forward.dcnv3_matrix_forward_kernel),
        "backward": Emulated(backward.dcnv3_matrix_backward_kernel),
    }
