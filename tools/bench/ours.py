"""seqpar."""

from seqpar.compile import sp_compile
from seqpar.tools.bench.contender import Call, Contender, Setting


def prepare(setting: Setting) -> Call:
    """`sp_compile` with fixed sizes: torch.compile of the peers gets those, too."""
    place = setting.place
    return sp_compile(
        setting.model, setting.inputs, ulysses=place.ulysses, ring=place.ring, mesh=place.device_mesh, dynamic=False, backend=setting.backend
    )


CONTENDER = Contender("seqpar", "seqpar", lambda ulysses, ring: True, prepare, "`sp_compile`, without any plan")
