"""What a saved program may call."""

import ast
import importlib
import inspect

import pytest
import torch

from seqpar.errors import SavedProgramError
from seqpar.passes import attend, emit, localise, turn
from seqpar.passes.save_targets import FUNCTIONS, read_target, write_target

aten = torch.ops.aten


@pytest.mark.parametrize("target", [aten.add.Tensor, aten.scaled_dot_product_attention.default, aten.sym_size.int, aten.einsum.default, torch.ops.prims.convert_element_type.default, *FUNCTIONS.values()], ids=lambda found: getattr(found, "__name__", str(found)))
def test_round_trip(target):
    assert read_target(write_target(target)) is target


@pytest.mark.parametrize("target", [aten.add_.Tensor, aten.from_file.default, print, eval, getattr, torch.load, torch.ops.higher_order.cond], ids=lambda found: getattr(found, "__name__", str(found)))
def test_refused_when_writing(target):
    with pytest.raises(SavedProgramError, match="cannot be saved"):
        write_target(target)


@pytest.mark.parametrize("name", ["aten.save.default", "aten.add.nothing", "builtins.eval", "aten.add", "os.path.join", "c10d.barrier.default", "seqpar.opaque_module.default", "aten._fields.x", None, 3])
def test_refused_when_reading(name):
    with pytest.raises(SavedProgramError, match="which a saved program must not"):
        read_target(name)


@pytest.mark.parametrize("module", [attend, emit, localise, turn], ids=lambda module: module.__name__)
def test_all_of_the_runtime_that_emission_uses_can_be_saved(module):
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("seqpar.runtime"):
            for name in (alias.name for alias in node.names):
                function = getattr(importlib.import_module(node.module), name)
                assert not inspect.isfunction(function) or function in FUNCTIONS.values(), name
