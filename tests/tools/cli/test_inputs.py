"""Inputs of a model from a JSON file."""

import inspect
import json

import pytest
import torch

from seqpar.errors import SeqparError
from seqpar.tools.cli.inputs import read_inputs


def forward(x, ids=None, sizes=(), options=None, return_dict=True):
    pass


def read(tmp_path, data, device="cpu"):
    path = tmp_path / "inputs.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return read_inputs(path, device, torch.bfloat16, inspect.signature(forward))


def test_tensors_and_plain_values(tmp_path):
    data = {
        "x": {"shape": [2, 3]},
        "ids": [{"shape": [50], "dtype": "int64", "high": 7}, {"values": [[1, 2]]}],
        "sizes": [[1, 4, 4]],
        "options": {"mask": {"shape": [40], "dtype": "bool"}, "scale": 0.5},
        "return_dict": False,
    }
    inputs = read(tmp_path, data)
    assert inputs["x"].shape == (2, 3) and inputs["x"].dtype == torch.bfloat16 and inputs["x"].unique().numel() > 3
    drawn, given = inputs["ids"]
    assert drawn.dtype == torch.int64 and set(drawn.tolist()) == set(range(7)) and given.tolist() == [[1, 2]]
    assert inputs["sizes"] == [[1, 4, 4]] and inputs["return_dict"] is False and inputs["options"]["scale"] == 0.5
    assert set(inputs["options"]["mask"].tolist()) == {True, False}
    again = read(tmp_path, data)
    assert torch.equal(again["x"], inputs["x"]), "seeded"
    assert read(tmp_path, data, "meta")["x"].device.type == "meta"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "cannot read"),
        ([1], "must hold an object"),
        ({"y": 1, "x": 2}, "does not fit the model.*'y'.*it takes x, ids"),
        ({"ids": 1}, "missing.*'x'"),
        ({"x": {"shape": [1], "dtype": "float33"}}, "x: 'float33' is no dtype"),
        ({"x": [{"shape": [1], "size": 3}]}, r"x\[0\]: a tensor has dtype, high, shape, values, not size"),
    ],
)
def test_errors_say_where(tmp_path, data, message):
    with pytest.raises(SeqparError, match=message):
        read(tmp_path, data)
