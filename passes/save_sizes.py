"""What a program requires of the sizes of its inputs, as JSON and back.

Before: Eq(s31, 2*s87), a sympy relation
After:  ["Eq", "s31", ["Mul", 2, "s87"]]

Expressions are put together from a list of known functions; no text is evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy

from seqpar.compat import size_bounds, size_functions
from seqpar.errors import SavedProgramError
from seqpar.passes.guards import InputSizes

PLAIN = (
    sympy.Add, sympy.Mul, sympy.Pow, sympy.Eq, sympy.Ne, sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, sympy.And, sympy.Or, sympy.Not,
    sympy.Max, sympy.Min, sympy.Mod, sympy.floor, sympy.ceiling, sympy.Abs, sympy.Piecewise,
)  # fmt: skip
# Public names, and torch's own functions of sizes under "torch.".
FUNCTIONS: dict[str, Any] = {kind.__name__: kind for kind in PLAIN} | {f"torch.{kind.__name__}": kind for kind in size_functions()}
NAMES = {kind: name for name, kind in FUNCTIONS.items()}
BOUNDS = size_bounds()
MAX_DEPTH = 40
MAX_DIGITS = 30


def write_expression(value: Any) -> Any:
    """An expression: a number, a symbol's name, or [function, argument, …].

    Raises:
        SavedProgramError: it holds another function.
    """
    value = sympy.sympify(value)
    if value is sympy.true or value is sympy.false:
        return bool(value)
    if isinstance(value, sympy.Integer):
        return int(value)
    if isinstance(value, sympy.Rational):
        return ["Rational", int(value.p), int(value.q)]
    if value in BOUNDS:
        return [BOUNDS[value]]
    if isinstance(value, sympy.Symbol):
        return value.name
    if type(value) not in NAMES:
        raise SavedProgramError(f"a program that relies on {value} cannot be saved: {type(value).__name__} is not one of {sorted(FUNCTIONS)}")
    return [NAMES[type(value)], *(write_expression(part) for part in value.args)]


def read_expression(data: Any, symbols: Mapping[str, sympy.Symbol], depth: int = 0) -> Any:
    """The inverse of `write_expression`; the symbols must be known."""
    if depth > MAX_DEPTH:
        raise SavedProgramError("the file holds an expression that is nested too deeply")
    if isinstance(data, bool):
        return sympy.true if data else sympy.false
    if isinstance(data, int) and len(str(abs(data))) <= MAX_DIGITS:
        return sympy.Integer(data)
    if isinstance(data, str) and data in symbols:
        return symbols[data]
    if isinstance(data, list) and data and isinstance(data[0], str):
        name, parts = data[0], [read_expression(part, symbols, depth + 1) for part in data[1:]]
        if name in BOUNDS.values() and not parts:
            return next(bound for bound, text in BOUNDS.items() if text == name)
        if name == "Rational" and len(parts) == 2 and all(isinstance(part, sympy.Integer) for part in parts) and parts[1] != 0:
            return sympy.Rational(*parts)
        if name in FUNCTIONS and not (name == "Pow" and not (parts[1:] and abs(parts[1]) <= MAX_DIGITS)):
            try:
                return FUNCTIONS[name](*parts)
            except Exception as error:
                raise SavedProgramError(f"the file holds {data!r:.100}, which is no expression of sizes: {error}") from None
    raise SavedProgramError(f"the file holds {data!r:.100}, which is no expression of sizes")


def write_sizes(sizes: InputSizes) -> dict[str, Any]:
    """`sizes` as what `json` can hold."""
    known = {*sizes.symbols, *sizes.ranges, *(s for relation in sizes.relations for s in sympy.sympify(relation).free_symbols)}
    if missing := sorted(str(symbol) for symbol in known - sizes.symbols.keys()):
        raise SavedProgramError(f"a program that relies on sizes which are no sizes of inputs ({', '.join(missing)}) cannot be saved")
    return {
        "names": list(sizes.names),
        "shapes": [[write_expression(size) for size in shape] for shape in sizes.shapes],
        "symbols": [[symbol.name, symbol.is_positive is True, *place] for symbol, place in sizes.symbols.items()],
        "ranges": [[symbol.name, write_expression(low), write_expression(high)] for symbol, (low, high) in sizes.ranges.items()],
        "relations": [write_expression(relation) for relation in sizes.relations],
    }


def read_sizes(data: Mapping[str, Any]) -> InputSizes:
    """The inverse of `write_sizes`."""
    names = tuple(str(name) for name in data["names"])
    symbols: dict[str, sympy.Symbol] = {}
    places: dict[sympy.Symbol, tuple[int, int]] = {}
    for name, positive, index, dim in data["symbols"]:
        if not (isinstance(name, str) and name.isidentifier() and index in range(len(names)) and dim in range(len(data["shapes"][index]))):
            raise SavedProgramError(f"the file holds {name!r:.40}, which is no size of an input")
        symbols[name] = sympy.Symbol(name, integer=True, positive=True) if positive else sympy.Symbol(name, integer=True)
        places[symbols[name]] = (index, dim)
    shapes = tuple(tuple(int(size) if type(size) is int else read_expression(size, symbols) for size in shape) for shape in data["shapes"])
    ranges = {symbols[name]: (read_expression(low, symbols), read_expression(high, symbols)) for name, low, high in data["ranges"]}
    if len(shapes) != len(names):
        raise SavedProgramError("the file holds another number of shapes than of inputs")
    return InputSizes(names, shapes, places, ranges, tuple(read_expression(relation, symbols) for relation in data["relations"]))
