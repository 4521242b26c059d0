"""Refusing what this lowering cannot emit or run."""

from __future__ import annotations

from typing import NoReturn

from kvxform.errors import CodegenError


def refuse(rule: str, got: object, at: str, hint: str) -> NoReturn:
    """Raise KVX401 of this lowering.

    Args:
        rule: What must hold.
        got: What was found instead.
        at: Layer, stream or node; empty if there is none to name.
        hint: The nearest plan that is supported; empty if there is none.
    """
    raise CodegenError("KVX401", rule, where="triton", got=got, at=at, hint=hint)
