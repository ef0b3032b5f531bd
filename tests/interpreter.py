"""Triton's interpreter with what its versions lack. TRITON_INTERPRET must be set before this is imported."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from triton.runtime import interpreter

assert os.environ.get("TRITON_INTERPRET") == "1"

InterpretedFunction = interpreter.InterpretedFunction
_patch_lang_tensor: Callable[[Any, Any], None] = interpreter._patch_lang_tensor


def _patch_with_index(tensor: Any, scope: Any) -> None:
    # Triton 3.6 asks for int() of one-element arrays, for loop bounds; NumPy 2.4 and later refuse.
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_with_index


def _boolean(method: str, position: int) -> None:
    # Triton 3.9 gives a comparison of scalars another type than bool, and refuses it in a mask.
    plain = getattr(interpreter.InterpreterBuilder, method)

    def call(self: Any, *args: Any) -> Any:
        args[position].data = args[position].data.astype(bool)
        return plain(self, *args)

    setattr(interpreter.InterpreterBuilder, method, call)


_boolean("create_masked_load", 1)
_boolean("create_masked_store", 2)

if torch.__version__ < "2.13":
    # It takes compiled kernels alone; it marks kernels for tracing, and nothing is traced here.
    torch.library.wrap_triton = lambda kernel: kernel
