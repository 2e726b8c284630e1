"""Plain values through JSON: equal afterwards, or refused."""

import json
import math

import pytest
import torch

from seqpar.compat import pytree
from seqpar.errors import SavedProgramError
from seqpar.passes.save_values import Codec, read_spec, read_tensor, write_spec, write_tensor

CODEC = Codec(torch.device("cpu"))
VALUES = [
    None, True, 3, -1, 10**30, "a 'text' \n", 0.1, -0.0, math.inf, 2 + 3j, (1, (2.5, None)), [1, [2]], {"a": 1, 2: (3,)}, slice(None, 4, 2), torch.float16,
    torch.device("cpu"), torch.strided, torch.channels_last, torch.Size([2, 3]), float, type(None), torch.dtype,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_round_trip(value):
    again = CODEC.read(json.loads(json.dumps(CODEC.write(value), allow_nan=False)))
    assert again == value and type(again) is type(value) and str(again) == str(value)


@pytest.mark.parametrize("value", [object(), len, {1, 2}, torch.device("cuda:1"), Codec, torch.ones(1), math], ids=lambda value: type(value).__name__)
def test_other_values_are_refused(value):
    with pytest.raises(SavedProgramError, match="cannot be saved"):
        CODEC.write(value)


@pytest.mark.parametrize("data", [1.5, {}, {"a": 1, "b": 2}, {"dtype": "load"}, {"dtype": 3}, {"float": "x"}, {"type": "os.system"}, {"device": "cuda:9"}, {"node": 0}, {"slice": 3}, {"layout": "float32"}])
def test_other_data_is_refused(data):
    with pytest.raises(SavedProgramError, match="the file"):
        CODEC.read(data)


def test_each_rank_has_its_own_device():
    first, second = (Codec(torch.device("cuda", i)) for i in range(2))
    assert second.read(first.write(torch.device("cuda", 0))) == torch.device("cuda", 1)
    assert second.read(first.write(torch.device("cpu"))) == torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0, 2), (2, 3)])
def test_tensors(dtype, shape):
    value = torch.arange(math.prod(shape)).reshape(shape).to(dtype).mT if len(shape) == 2 else torch.ones(shape, dtype=dtype)
    form, raw = write_tensor(value)
    again = read_tensor(json.loads(json.dumps(form)), raw, CODEC)
    assert torch.equal(again, value) and again.dtype == dtype
    with pytest.raises(SavedProgramError, match="does not fit its shape"):
        read_tensor({**form, "shape": [7]}, raw, CODEC)


def test_specs():
    value = {"a": [1, (2, None)], "b": torch.Size([1])}
    spec = pytree.tree_structure(value)
    assert read_spec(json.loads(json.dumps(write_spec(spec, CODEC))), CODEC) == spec
    for data in (["dict", ["a"], []], ["float", None, []], ["os.system", None, []]):
        with pytest.raises(SavedProgramError):
            read_spec(data, CODEC)
