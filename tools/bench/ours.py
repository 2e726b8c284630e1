"""seqpar."""

import statistics

import torch

from seqpar.compile import sp_compile
from seqpar.partitioner.cost import Machine
from seqpar.tools.bench.contender import Call, Contender, Setting
from seqpar.tools.calibrate import Sizes, compute_rates

SAMPLE = Sizes(width=1024, tokens=1024, heads=8, head_dim=64)


def prepare(setting: Setting, machine: Machine | None = None) -> Call:
    """`sp_compile` with fixed sizes: torch.compile of the peers gets those, too."""
    place = setting.place
    return sp_compile(
        setting.model, setting.inputs, ulysses=place.ulysses, ring=place.ring, mesh=place.device_mesh, dynamic=False, backend=setting.backend, hardware=machine
    )


def prepare_rated(setting: Setting) -> Call:
    """The same for the rates of these ranks, which are measured, and of the link, which are stated. Collective."""
    assert setting.slow_link is not None
    bits_per_s, latency_s = setting.slow_link
    parameter = next(setting.model.parameters())
    rates = compute_rates(SAMPLE, parameter.dtype, 5, parameter.device)
    slowest = torch.tensor(statistics.harmonic_mean(rates.values()), dtype=torch.float64)  # ranks must decide alike
    torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MIN)
    return prepare(setting, Machine(flops_per_s=float(slowest), bytes_per_s=bits_per_s / 8, latency_s=latency_s, name="these ranks, this link"))


CONTENDER = Contender("seqpar", "seqpar", lambda ulysses, ring: True, prepare, "`sp_compile`, without any plan")
RATED = Contender(
    "seqpar-rates", "seqpar rates", lambda ulysses, ring: True, prepare_rated, "the same with `hardware=`: rates of these ranks and of the simulated link"
)
