"""Expressions of sizes through JSON."""

import json

import pytest
import sympy

from seqpar.compat import FloorDiv
from seqpar.errors import SavedProgramError
from seqpar.passes.guards import InputSizes
from seqpar.passes.save_sizes import read_expression, read_sizes, write_expression, write_sizes

S, T = (sympy.Symbol(name, integer=True, positive=True) for name in ("s0", "s1"))
KNOWN = {"s0": S, "s1": T}


@pytest.mark.parametrize(
    "value",
    [S, sympy.Integer(3), 2 * S + T, S**2, FloorDiv(S + 1, 2), sympy.Eq(S, 2 * T), sympy.Mod(S, 4) > 1, sympy.And(S > 1, sympy.Ne(S, T)), sympy.Max(S, T, 3), S / 2, sympy.true, sympy.oo],
    ids=str,
)
def test_round_trip(value):
    assert read_expression(json.loads(json.dumps(write_expression(value))), KNOWN) == value


@pytest.mark.parametrize("data", ["s9", ["Lambda", "s0", "s0"], ["Pow", 10, 10**9], 10**40, [], [3], {"a": 1}, None, 1.5, ["Rational", 1, 0], "__import__('os')"], ids=str)
def test_other_data_is_refused(data):
    with pytest.raises(SavedProgramError, match="no expression of sizes"):
        read_expression(data, KNOWN)


def test_depth_is_limited():
    data = "s0"
    for _ in range(100):
        data = ["Add", data, 1]
    with pytest.raises(SavedProgramError, match="too deeply"):
        read_expression(data, KNOWN)


def test_sizes_of_inputs():
    sizes = InputSizes(("x", "y"), ((2, S), (T, S + T)), {S: (0, 1), T: (1, 0)}, {S: (sympy.Integer(2), sympy.Integer(99))}, (sympy.Ge(T, 2),))
    again = read_sizes(json.loads(json.dumps(write_sizes(sizes))))
    assert again == sizes and again.failed([(2, 5), (3, 8)]) is None
    assert "x.shape[1] <= 99" in again.failed([(2, 100), (3, 103)]) and "y.shape[0] >= 2" in again.failed([(2, 5), (1, 6)]).replace("2 <= y.shape[0]", "y.shape[0] >= 2")
    with pytest.raises(SavedProgramError, match="no sizes of inputs"):
        write_sizes(InputSizes(("x",), ((S,),), {S: (0, 0)}, {}, (sympy.Ge(T, 2),)))
    with pytest.raises(SavedProgramError, match="no size of an input"):
        read_sizes({**write_sizes(sizes), "symbols": [["s0", True, 5, 0]]})
