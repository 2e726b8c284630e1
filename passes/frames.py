"""Where an operator was called: the lines of `forward`s, which reports show, and of functions between them, by which it can be asked for.

Before: meta["stack_trace"] = forward of the model, forward of a block, a function that it calls
After:  meta["stack_trace"] = forward of the model, forward of a block; meta["helper_lines"] = ("/path/file.py:12",),
        meta["inner_line"] = "/path/file.py:12" (that of the last, where no `forward` is called from it)
"""

from __future__ import annotations

import contextlib
import os
import re
import sysconfig
from typing import Any

import torch

from seqpar import compat
from seqpar.compat import helpers_in_traces
from seqpar.passes import boundary, flat_model

HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
OWN_FILES = (compat.__file__, flat_model.__file__, boundary.__file__, os.path.join(os.path.dirname(HERE.rstrip(os.sep)), "sp_sharding.py"))  # between the user's frames
STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
# The standard library holds site-packages, where the user's libraries are.
HIDDEN = (os.path.dirname(torch.__file__) + os.sep, HERE, *OWN_FILES, STDLIB + "contextlib", STDLIB + "functools", "<")
FRAME = re.compile(r'\s*File "([^"]+)", line (\d+), in (\S+)')


def helpers_seen() -> contextlib.AbstractContextManager[None]:
    """Within it, what is exported has these lines in its stack traces at all."""
    return helpers_in_traces(HIDDEN)


def split_frames(meta: dict[str, Any]) -> None:
    """Take the frames of `OWN_FILES` out of the stack trace and, if a `forward` of the user is in it, the lines of other functions."""
    frames = [(frame, FRAME.match(frame)) for frame in re.split(r"\n(?=\s*File )", meta["stack_trace"])]
    frames = [(frame, found) for frame, found in frames if found is None or not found[1].startswith(OWN_FILES)]
    users = [found for _, found in frames if found and not found[1].startswith(HIDDEN)]
    if any(found[3] == "forward" for found in users):
        helpers = [found for found in users if found[3] != "forward"]
        frames = [(frame, found) for frame, found in frames if found not in helpers]
        if helpers:
            meta["helper_lines"] = tuple(f"{found[1]}:{found[2]}" for found in helpers)
        if users[-1] in helpers:
            meta["inner_line"] = meta["helper_lines"][-1]
    meta["stack_trace"] = "\n".join(frame for frame, _ in frames)
