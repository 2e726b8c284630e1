"""The model itself, on one rank."""

from seqpar.tools.bench.contender import Call, Contender, Setting, compiled


def prepare(setting: Setting) -> Call:
    """Nothing but the model."""
    return compiled(setting.model, setting.backend)


CONTENDER = Contender("one", "one process", lambda ulysses, ring: True, prepare, "the model itself on rank 0, while the other ranks wait", alone=True)
