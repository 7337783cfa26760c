"""Functions whose result torch.compile takes for a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def constant_result(function: Callable[P, R]) -> Callable[P, R]:
    """Let a compiled network hold what the function returns, as it holds its weights, and not look into the function.

    The mark is that of `torch.compiler.assume_constant_result`, which imports the compiler to set it. That takes longer
    than the import of torch, and most commands compile nothing.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
