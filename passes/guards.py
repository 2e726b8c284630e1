"""When may a symbolic program be used for other input sizes? When everything that tracing and partitioning relied on holds.

Before: a program traced at hidden_states [1, 4, 2, 8, 8]; new inputs [1, 4, 3, 8, 16]
After:  None (use it), or the first condition that does not hold, as text
"""

from collections.abc import Iterable, Sequence

import sympy

from seqpar.compat import shape_guards, symbol_range, symbolic_shape
from seqpar.passes.trace import Traced


def failed_guard(traced: Traced, shapes: Sequence[Sequence[int]], conditions: Iterable[sympy.Basic] = ()) -> str | None:
    """The first reason why the program of `traced` must not run on tensors of `shapes`, or None.

    Args:
        traced: the traced program, with all sizes fixed or symbolic.
        shapes: concrete (global) shape of each placeholder, in order.
        conditions: further relations over the same symbols, assumed by later stages.
    """
    inputs = [node for node in traced.gm.graph.nodes if node.op == "placeholder"]
    if len(inputs) != len(shapes):
        return f"{len(shapes)} tensors instead of {len(inputs)}"
    for node, shape in zip(inputs, shapes, strict=True):
        if node.meta["val"].dim() != len(shape):
            return f"{node.name} has {len(shape)} dims instead of {node.meta['val'].dim()}"
    values = {symbol: sympy.Integer(shapes[index][dim]) for symbol, (index, dim) in traced.symbols.items()}
    for node, shape in zip(inputs, shapes, strict=True):
        for dim, (expected, actual) in enumerate(zip(symbolic_shape(node.meta["val"]), shape, strict=True)):
            if sympy.sympify(expected).xreplace(values) != actual:
                return f"{node.name}.shape[{dim}] == {expected} (it is {actual})"
    if traced.shape_env is None:
        return None
    for symbol, value in values.items():
        low, high = symbol_range(traced.shape_env, symbol)
        if not low <= value <= high:
            bound = f">= {low}" if value < low else f"<= {high}"
            return f"{readable(symbol, traced)} {bound} (it is {value})"
    for guard in (*shape_guards(traced.shape_env), *conditions):
        if sympy.sympify(guard).xreplace(values) is not sympy.true:
            return readable(guard, traced)
    return None


def guards_hold(traced: Traced, shapes: Sequence[Sequence[int]], conditions: Iterable[sympy.Basic] = ()) -> bool:
    """True if the program of `traced` is valid for tensors of `shapes`; see `failed_guard`."""
    return failed_guard(traced, shapes, conditions) is None


def readable(relation: sympy.Basic, traced: Traced) -> str:
    """`Eq(s31, 9)` -> `Eq(encoder_hidden_states.shape[1], 9)`."""
    inputs = [node.name for node in traced.gm.graph.nodes if node.op == "placeholder"]
    names = {symbol: sympy.Symbol(f"{inputs[index]}.shape[{dim}]") for symbol, (index, dim) in traced.symbols.items()}
    return str(relation.xreplace(names))
