"""diffusers' own context parallelism, with the plan that is written by hand in the model's class, in its three forms."""

from functools import partial
from typing import Any

from seqpar.tools.bench.contender import Call, Contender, Setting, compiled, copied
from seqpar.tools.diffusers_peer import enable


def prepare(setting: Setting, **options: Any) -> Call:
    """Its hooks on a copy of the model. options: more of its ContextParallelConfig."""
    place = setting.place
    assert place.device_mesh is not None
    return compiled(enable(copied(setting.model), place.ulysses, place.ring, place.device_mesh, **options), setting.backend)


PLAIN = Contender("diffusers", "diffusers", lambda ulysses, ring: True, prepare, "`enable_parallelism` of diffusers with its hand-written `_cp_plan`")
ULYSSES_ANYTHING = Contender(
    "diffusers-anything",
    "diffusers anything",
    lambda ulysses, ring: ring == 1,
    partial(prepare, ulysses_anything=True),
    "the same with `ulysses_anything`, which takes lengths and head counts that do not divide",
)
RING_ANYTHING = Contender(
    "diffusers-ring-anything",
    "diffusers ring-any",
    lambda ulysses, ring: ulysses == 1,
    partial(prepare, ring_anything=True),
    "the same with `ring_anything`",
)
