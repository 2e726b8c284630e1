"""The recorded call of a module that runs as it is (`runtime/opaque.py`), as JSON and back.

Before: OpaqueCall("blocks.0.mlp", …)
After:  {"name": "blocks.0.mlp", "inputs": [[[1, 12, 8], {"dtype": "float32"}]], …}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from seqpar.errors import SavedProgramError
from seqpar.passes.save_values import Codec, read_spec, write_spec
from seqpar.runtime.opaque import Form, OpaqueCall


def write_call(call: OpaqueCall, codec: Codec) -> dict[str, Any]:
    """Raises SavedProgramError if its arguments hold other than plain values."""
    return {
        **{key: getattr(call, key) for key in ("name", "kind", "reader", "where", "flops", "by_token")},
        "in_spec": write_spec(call.in_spec, codec),
        "arguments": codec.write(call.arguments),
        "places": list(call.places),
        "inputs": [write_form(form, codec) for form in call.inputs],
        "out_spec": write_spec(call.out_spec, codec),
        "outputs": [write_form(form, codec) for form in call.outputs],
        "autocast": codec.write(call.autocast),
    }


def read_call(data: Mapping[str, Any], codec: Codec) -> OpaqueCall:
    """The inverse of `write_call`."""
    texts = {key: str(data[key]) for key in ("name", "kind", "reader", "where")}
    if not re.fullmatch(r"\w+(\.\w+)*", texts["name"]):
        raise SavedProgramError(f"the file runs the module {texts['name']!r:.80}, which is no name of one")
    try:
        return OpaqueCall(
            **texts,
            in_spec=read_spec(data["in_spec"], codec),
            arguments=codec.read(data["arguments"]),
            places=tuple(int(place) for place in data["places"]),
            inputs=tuple(read_form(form, codec) for form in data["inputs"]),  # type: ignore[misc]
            out_spec=read_spec(data["out_spec"], codec),
            outputs=tuple(read_form(form, codec) for form in data["outputs"]),
            flops=int(data["flops"]),
            autocast=codec.read(data["autocast"]),
            by_token=bool(data["by_token"]),
        )
    except AssertionError:
        raise SavedProgramError(f"the file holds a call of {texts['name']} whose parts do not fit each other") from None


def write_form(form: Form | None, codec: Codec) -> Any:
    return None if form is None else [list(form.shape), codec.write(form.dtype)]


def read_form(data: Any, codec: Codec) -> Form | None:
    return None if data is None else Form(tuple(int(n) for n in data[0]), codec.read(data[1]))
