"""Do all ranks run the same program? Compared through the key-value store: an error in seconds, never a hang."""

import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store, _resolve_process_group

from seqpar.errors import DisagreementError
from seqpar.runtime.mesh import SequenceMesh

LINGER_SECONDS = 5.0


def check_agreement(fingerprint: str, mesh: SequenceMesh, timeout_s: float = 30) -> None:
    """Return when all ranks of the mesh have called this with the same fingerprint.

    Raises DisagreementError on every rank that called: naming the ranks whose fingerprints differ and the first
    line that does, or the ranks that did not call within `timeout_s`.
    """
    if mesh.size == 1:
        return
    said, read = _exchange(fingerprint, mesh, timeout_s)
    if len(set(said.values())) > 1:
        # The rank that hosts the store must not exit before everybody knows.
        _wait(_get_default_store(), read, min(timeout_s, LINGER_SECONDS))
        raise DisagreementError(_describe(said))


def everybody_says(text: str, mesh: SequenceMesh, timeout_s: float = 30) -> dict[int, str]:
    """What every rank of the mesh passed to this call, by global rank (0 for a mesh of one); all of them get the same.

    Raises DisagreementError if a rank did not call within `timeout_s`.
    """
    return {0: text} if mesh.size == 1 else _exchange(text, mesh, timeout_s)[0]


def _exchange(text: str, mesh: SequenceMesh, timeout_s: float) -> tuple[dict[int, str], list[str]]:
    """What every rank said, and the keys that are set when everybody has read it."""
    store, me = _get_default_store(), dist.get_rank()
    ranks = dist.get_process_group_ranks(_resolve_process_group(mesh.groups["sp"]))  # type: ignore[arg-type]
    scope = "seqpar/agree/" + "-".join(map(str, ranks))
    turn = store.add(f"{scope}/turn/{me}", 1)  # the n-th call of one rank is compared with the n-th of the others
    store.set(f"{scope}/{turn}/said/{me}", text)
    missing = _wait(store, [f"{scope}/{turn}/said/{r}" for r in ranks], timeout_s)
    if missing:
        silent = [ranks[i] for i in missing]
        raise DisagreementError(
            f"rank(s) {silent} did not reach the compilation that rank {me} is in within {timeout_s:g} s: they failed, or "
            f"compile something else. Every rank must compile the same model for the same inputs, in the same order"
        )
    said = {r: store.get(f"{scope}/{turn}/said/{r}").decode() for r in ranks}
    store.set(f"{scope}/{turn}/read/{me}", "")
    return said, [f"{scope}/{turn}/read/{r}" for r in ranks]


def _wait(store: dist.Store, keys: Sequence[str], timeout_s: float) -> list[int]:
    """Indices of the keys that were not set in time."""
    deadline = time.monotonic() + timeout_s
    missing = []
    for i, key in enumerate(keys):
        try:
            store.wait([key], timedelta(seconds=max(0.01, deadline - time.monotonic())))
        except RuntimeError:  # stores differ in which one they raise
            missing.append(i)
    return missing


def _describe(said: dict[int, str]) -> str:
    camps: dict[str, list[int]] = {}
    for rank, text in said.items():
        camps.setdefault(text, []).append(rank)
    first, *others = sorted(camps, key=lambda text: (-len(camps[text]), camps[text]))
    lines = [f"the ranks do not compile the same program: rank(s) {camps[first]} agree"]
    for text in others:
        ours, theirs = _first_difference(first, text)
        lines.append(f"rank(s) {camps[text]} differ from them: {theirs!r} instead of {ours!r}")
    return "; ".join(lines) + ". Use the same model, inputs, degrees and package versions on every rank"


def _first_difference(a: str, b: str, width: int = 120) -> tuple[str, str]:
    """The first lines that differ, cut to `width`."""
    left, right = a.splitlines(), b.splitlines()
    longest = max(len(left), len(right))
    left, right = left + [""] * (longest - len(left)), right + [""] * (longest - len(right))
    pairs = (pair for pair in zip(left, right, strict=True) if pair[0] != pair[1])
    x, y = next(pairs, (a, b))
    return x[:width], y[:width]
