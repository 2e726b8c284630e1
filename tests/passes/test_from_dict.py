"""Dataclasses through JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest

from seqpar.passes.from_dict import read_dataclass


@dataclass(frozen=True)
class Part:
    name: str
    share: float


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    pair: tuple[int, str]
    counts: Mapping[int, Part]
    best: Part | None = None
    anything: Any = None
    more: list[int] = field(default_factory=list)


VALUE = Whole((Part("a", 0.5), Part("b", 1)), (3, "x"), {7: Part("c", 2.0)}, Part("d", 0.0), {"k": [1]}, [1, 2])


def test_round_trip():
    data = json.loads(json.dumps(asdict(VALUE)))
    assert read_dataclass(Whole, data) == VALUE
    assert read_dataclass(Whole, {**data, "best": None, "unknown": 1}).best is None
    assert read_dataclass(Whole, {key: data[key] for key in ("parts", "pair", "counts")}).more == []


@pytest.mark.parametrize(("change", "message"), [({"parts": [{"name": 3, "share": 1.0}]}, "3 is no str"), ({"parts": [{"name": "a"}]}, "a Part needs share")])
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        read_dataclass(Whole, {**asdict(VALUE), **change})
