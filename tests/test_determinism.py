"""The same model gives the same plan and the same graphs: again, with inputs in another order, and in another process.

Ranks compile on their own and exchange data by what they compiled, so anything that differs between processes would be a wrong answer.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from seqpar.models import registry
from seqpar.models.randomise import randomise
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace

CASES = (("flux", None), ("pattern-unified", None))


def reverse_registration(module):
    """Register all submodules and parameters in the other order."""
    for child in module.modules():
        if not isinstance(child, torch.nn.ModuleList | torch.nn.Sequential):
            for entries in (child._modules, child._parameters, child._buffers):
                items = list(entries.items())
                entries.clear()
                entries.update(reversed(items))


def described(name, dynamic, change=""):
    """Plan, fingerprint and the code of two ranks."""
    family = registry.get(name)
    config = family.tiny_config(4, 1)
    model = randomise(family.build(config))
    inputs = family.grid_inputs(config, rows=3, columns=5, text_len=7)
    if change == "inputs":
        inputs = dict(reversed(inputs.items()))
    elif change == "registration":
        reverse_registration(model)
    partitioned = partition(trace(model, (), inputs, dynamic=dynamic), ulysses=2, ring=2)
    plan = partitioned.plan.to_dict()
    del plan["seconds"]
    codes = [partitioned.program(rank).code for rank in (0, 3)]
    return json.loads(json.dumps({"plan": plan, "fingerprint": partitioned.fingerprint, "codes": codes, "conditions": [str(c) for c in partitioned.conditions]}))


@pytest.mark.parametrize("change", ["inputs", "registration"])
def test_in_another_order(change):
    assert described("flux", False, change) == described("flux", False)


def test_in_other_processes():
    """Sets of strings and of symbols are iterated in another order in each process."""
    folder, file = os.path.split(__file__)
    program = f"import sys, json; sys.path.append({folder!r}); import {file.removesuffix('.py')} as t; print(json.dumps([t.described(*case) for case in t.CASES]))"
    running = [
        subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True)
        for seed in ("1", "2")
    ]
    first, second = (json.loads(process.communicate(timeout=900)[0].splitlines()[-1]) for process in running)
    assert first == second
    assert all(found["plan"]["attention"] and "ring_attention" in found["codes"][0] for found in first)
