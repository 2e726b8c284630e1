"""Which calls share a program, which need another one, which are refused."""

import inspect

import pytest
import torch

from seqpar.errors import SignatureError
from seqpar.signature import Signature, differences, fixed_part, read, summary


def forward(x, states=None, *, scale: float = 1.0, flag: bool = False, extra=None):
    pass


SIGNATURE = inspect.signature(forward)


def key_of(*args, **kwargs):
    items: list = []
    tensors: list = []
    read([args, kwargs], items, tensors)
    return tuple(items), tensors


def example(**kwargs):
    return Signature(SIGNATURE, (), {"x": torch.ones(2, 3), "states": [torch.ones(1), torch.ones(2)], "extra": {"a": 1, "b": None}, **kwargs})


def test_key_tells_what_matters_apart():
    x = torch.ones(2, 3)
    base = key_of(x, 1, [x])[0]
    assert base == key_of(torch.zeros(2, 3), 1, [torch.zeros(2, 3, requires_grad=True)])[0]
    others = [(x, 1.0, [x]), (x, True, [x]), (x, 1, (x,)), (x, 1, [x, x]), (x.double(), 1, [x]), (x[:1], 1, [x]), (x, 1, [None]), (x, "1", [x])]
    assert all(key_of(*other)[0] != base for other in others)
    assert key_of(0.0)[0] != key_of(-0.0)[0] and key_of(float("nan"))[0] == key_of(float("nan"))[0]
    assert fixed_part(base) == fixed_part(key_of(x[:1], 1, [x])[0]) != fixed_part(key_of(x[0], 1, [x])[0])


def test_tensors_come_in_flatten_order():
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    assert [t.numel() for t in key_of([c, {"k": (a, b)}])[1]] == [3, 1, 2]
    signature = example()
    order = signature.tensor_order((a,), {"extra": {"a": c, "b": None}, "states": [b, b]})
    assert order == (0, 2, 3, 1)


def test_unknown_objects_are_refused():
    with pytest.raises(SignatureError, match="object"):
        key_of(object())
    key_of(torch.float32, torch.device("cpu"), print, int, torch.Size([1]))


def test_positional_and_keyword_calls_are_one():
    signature = example()
    by_name = signature.check((), {"x": torch.ones(1, 3), "states": [torch.ones(4)], "extra": {"a": 2, "b": None}})
    by_place = signature.check((torch.ones(1, 3), [torch.ones(4)]), {"extra": {"a": 2, "b": None}})
    assert by_name.paths == by_place.paths == ("x", "states[0]", "scale", "flag", "extra['a']", "extra['b']")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": [torch.ones(1), None]}, r"states\[1\] is None, but was a tensor"),
        ({"states": (torch.ones(1), torch.ones(2))}, "states is a tuple, but was a list"),
        ({"states": None}, "states is None, but was a list"),
        ({"x": 3}, "x is a plain value .* but was a tensor"),
        ({"flag": torch.ones(1)}, "flag is a tensor, but was a plain value"),
        ({"extra": {"a": 1}}, r"extra has the keys \['a'\], but had \['a', 'b'\]"),
        ({"extra": {"a": 1, "b": torch.ones(1)}}, r"extra\['b'\] is a tensor, but was None"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_another_structure_is_refused(change, message):
    signature = example()
    call = {"x": torch.ones(2, 3), "states": [torch.ones(1), torch.ones(2)], "extra": {"a": 1, "b": None}}
    with pytest.raises(SignatureError, match=message):
        signature.check((), {**call, **change})


def test_missing_argument_is_refused():
    with pytest.raises(SignatureError, match="missing a required argument: 'x'"):
        example().check((), {})


def test_lengths_shapes_and_values_may_differ():
    call = example().check((), {"x": torch.ones(5, 3).half(), "states": [torch.ones(9)] * 4, "scale": 2.5, "flag": True, "extra": {"a": 5, "b": None}})
    text = differences(summary(example().example), summary(call))
    assert text.startswith("x [2, 3] float32 meta -> [5, 3] float16 cpu; states[0] [1] float32 meta -> [9] float32 cpu;") and text.endswith("more")
