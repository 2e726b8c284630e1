"""Stack traces are divided into what is shown and what can only be asked for."""

import os

import torch

from seqpar.passes import boundary
from seqpar.passes.frames import split_frames

FORWARD = 'File "/models/block.py", line 10, in forward\n    y = rotate(x)'
HELPER = '  File "/models/rope.py", line 3, in rotate\n    return x.flip(-1)'
TORCH = f'  File "{os.path.dirname(torch.__file__)}/nn/functional.py", line 9, in linear\n    return linear(x)'
OWN = f'  File "{boundary.__file__}", line 7, in forward\n    return mark(x)'


def split(*frames):
    meta = {"stack_trace": "\n".join(frames)}
    split_frames(meta)
    return meta


def test_helpers_are_apart():
    line = "/models/rope.py:3"
    assert split(FORWARD, HELPER, TORCH, OWN) == {"stack_trace": f"{FORWARD}\n{TORCH}", "helper_lines": (line,), "inner_line": line}


def test_a_decorator_around_a_forward_is_not_the_inner_line():
    assert split(HELPER.strip(), f"  {FORWARD}", TORCH) == {"stack_trace": f"  {FORWARD}\n{TORCH}", "helper_lines": ("/models/rope.py:3",)}


def test_nothing_is_lost_without_a_forward():
    assert split(HELPER, TORCH) == {"stack_trace": f"{HELPER}\n{TORCH}"} and split(OWN, HELPER) == {"stack_trace": HELPER}
    assert split("no frame at all") == {"stack_trace": "no frame at all"}
