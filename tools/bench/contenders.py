"""All contenders, in the order of the table."""

from seqpar.tools.bench import diffusers_cp, one_process, ours, torch_cp, yunchang_attention
from seqpar.tools.bench.contender import Contender

ALONE = one_process.CONTENDER
PEERS: tuple[Contender, ...] = (
    diffusers_cp.PLAIN,
    diffusers_cp.ULYSSES_ANYTHING,
    diffusers_cp.RING_ANYTHING,
    torch_cp.CONTENDER,
    yunchang_attention.CONTENDER,
)
OURS = ours.CONTENDER
RATED = ours.RATED
OWN = (OURS.name, RATED.name)
