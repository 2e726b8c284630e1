"""When may a symbolic program be used for other input sizes? When everything that tracing and partitioning relied on holds.

Before: a program traced at hidden_states [1, 4, 2, 8, 8]; new inputs [1, 4, 3, 8, 16]
After:  None (use it), or the first condition that does not hold, as text
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import sympy

from seqpar.compat import shape_guards, symbol_range, symbolic_shape
from seqpar.passes.trace import Traced


@dataclass(frozen=True)
class InputSizes:
    """What a program requires of the (global) sizes of its inputs.

    Invariants: `names` and `shapes` have one entry per placeholder; `symbols` says where a symbol is read: (placeholder, dim); `ranges`
    are inclusive; `relations` hold between the symbols.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int | sympy.Expr, ...], ...]
    symbols: Mapping[sympy.Symbol, tuple[int, int]]
    ranges: Mapping[sympy.Symbol, tuple[sympy.Expr, sympy.Expr]]
    relations: tuple[sympy.Basic, ...]

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.shapes)

    def failed(self, shapes: Sequence[Sequence[int]]) -> str | None:
        """The first reason why the program must not run on tensors of `shapes` (concrete, per placeholder), or None."""
        if len(self.names) != len(shapes):
            return f"{len(shapes)} tensors instead of {len(self.names)}"
        for name, expected, shape in zip(self.names, self.shapes, shapes, strict=True):
            if len(expected) != len(shape):
                return f"{name} has {len(shape)} dims instead of {len(expected)}"
        values = {symbol: sympy.Integer(shapes[index][dim]) for symbol, (index, dim) in self.symbols.items()}
        for name, expected, shape in zip(self.names, self.shapes, shapes, strict=True):
            for dim, (size, actual) in enumerate(zip(expected, shape, strict=True)):
                if sympy.sympify(size).xreplace(values) != actual:
                    return f"{name}.shape[{dim}] == {size} (it is {actual})"
        for symbol, (low, high) in self.ranges.items():
            value = values[symbol]
            if not low <= value <= high:
                return f"{self.readable(symbol)} {f'>= {low}' if value < low else f'<= {high}'} (it is {value})"
        for relation in self.relations:
            if sympy.sympify(relation).xreplace(values) is not sympy.true:
                return self.readable(relation)
        return None

    def readable(self, relation: sympy.Basic) -> str:
        """`Eq(s31, 9)` -> `Eq(encoder_hidden_states.shape[1], 9)`."""
        names = {symbol: sympy.Symbol(f"{self.names[index]}.shape[{dim}]") for symbol, (index, dim) in self.symbols.items()}
        return str(relation.xreplace(names))


def input_sizes(traced: Traced, conditions: Iterable[sympy.Basic] = ()) -> InputSizes:
    """What the program of `traced` requires. conditions: further relations over the same symbols, assumed by later stages."""
    inputs = [node for node in traced.gm.graph.nodes if node.op == "placeholder"]
    names = tuple(node.name for node in inputs)
    shapes = tuple(tuple(symbolic_shape(node.meta["val"])) for node in inputs)
    if traced.shape_env is None:
        return InputSizes(names, shapes, traced.symbols, {}, ())
    ranges = {symbol: symbol_range(traced.shape_env, symbol) for symbol in traced.symbols}
    return InputSizes(names, shapes, traced.symbols, ranges, (*shape_guards(traced.shape_env), *conditions))


def failed_guard(traced: Traced, shapes: Sequence[Sequence[int]], conditions: Iterable[sympy.Basic] = ()) -> str | None:
    """The first reason why the program of `traced` must not run on tensors of `shapes`, or None.

    Args:
        traced: the traced program, with all sizes fixed or symbolic.
        shapes: concrete (global) shape of each placeholder, in order.
        conditions: further relations over the same symbols, assumed by later stages.
    """
    return input_sizes(traced, conditions).failed(shapes)


def guards_hold(traced: Traced, shapes: Sequence[Sequence[int]], conditions: Iterable[sympy.Basic] = ()) -> bool:
    """True if the program of `traced` is valid for tensors of `shapes`; see `failed_guard`."""
    return failed_guard(traced, shapes, conditions) is None
