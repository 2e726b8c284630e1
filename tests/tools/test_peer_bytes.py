"""seqpar receives no more than diffusers with its hand-written plans; counted on real ranks and on meta tensors."""

import json

import pytest
import torch
import torch.distributed as dist

from seqpar.runtime.groups import all_reduce, start_all_gather, start_all_to_all, start_ring_exchange, wait
from seqpar.tools import peer_bytes
from seqpar.tools.collective_counter import CollectiveCounter
from seqpar.tools.sized_models import PEER_MODELS, Sizes

SIZES = Sizes(heads=4, head_dim=16, blocks=2, tokens=1024, text_tokens=32)
WIDTH = 64


@pytest.fixture(scope="module")
def on_two_ranks():
    return peer_bytes.measure(PEER_MODELS, SIZES, [(2, 1)])


@pytest.mark.parametrize("name", PEER_MODELS)
def test_ranks_receive_no_more_than_those_of_diffusers(on_two_ranks, name):
    theirs, refusal, ours = on_two_ranks[name, 2, 1]
    theirs, ours = peer_bytes.Count(**theirs), peer_bytes.Count(**ours)
    assert refusal == "" and theirs.relative_error < 1e-5 and ours.relative_error < 1e-5  # the peer is right, so its bytes count
    assert ours.total_bytes <= theirs.total_bytes and ours.total_calls <= 0.56 * theirs.total_calls

    found = peer_bytes.compare([name], SIZES, [(2, 1), (4, 1), (1, 2), (1, 4), (2, 2)], meta=True)
    assert [c.refusal for c in found] == [""] * 5
    assert max(c.bytes_ratio for c in found) <= 1, peer_bytes.table(found)
    # Without ranks the same is counted as on real ones, by the plan as well.
    assert (found[0].diffusers.bytes, found[0].diffusers.calls) == (theirs.bytes, theirs.calls)
    assert (found[0].planned.bytes, found[0].planned.calls) == (ours.bytes, ours.calls)


def test_flux_with_four_blocks_needs_about_half_of_the_calls():
    (found,) = peer_bytes.compare(["flux"], Sizes(4, 16, 4, 256, 32), [(2, 1)], meta=True)
    assert (found.planned.total_calls, found.diffusers.total_calls) == (9, 17) and found.calls_ratio <= 0.55 and found.bytes_ratio <= 1


@pytest.mark.parametrize(
    ("name", "sizes", "mesh"),
    [
        ("qwen-image", Sizes(4, 16, 2, 256, 32), (2, 1)),
        ("wan", Sizes(8, 64, 2, 2048, 512), (1, 2)),
        ("flux", Sizes(8, 64, 2, 256, 256), (4, 1)),
        ("wan", Sizes(8, 32, 2, 64, 128), (2, 1)),
        ("ltx-video", Sizes(8, 64, 2, 256, 256), (2, 2)),
    ],
)
def test_short_sequences_receive_no_more(name, sizes, mesh):
    (found,) = peer_bytes.compare([name], sizes, [mesh], meta=True)
    assert found.refusal == "" and found.bytes_ratio <= 1


def test_the_peer_is_counted_as_its_code_is_written():
    """Flux, 4 ranks: Ulysses exchanges q, k, v and the output of each block one by one; its ring gathers k and v at once."""
    (ulysses, _), (ring, _) = (peer_bytes.imagined("flux", SIZES, *mesh) for mesh in ((4, 1), (1, 4)))
    part = (SIZES.tokens + SIZES.text_tokens) // 4 * WIDTH * 4
    output = SIZES.tokens * 16 * 4 * 3 // 4
    assert ulysses.bytes == {"all_to_all": 2 * 4 * part * 3 // 4, "ring": 0, "all_gather": output, "all_reduce": 0}
    assert ulysses.calls == {"all_to_all": 8, "ring": 0, "all_gather": 1, "all_reduce": 0}
    assert ring.bytes == {"all_to_all": 0, "ring": 0, "all_gather": 2 * 3 * 2 * part + output, "all_reduce": 0}


def test_uneven_sizes_are_refused_by_diffusers_and_planned_here(capsys, tmp_path):
    arguments = ["--meta", "--model", "flux", "--ulysses", "2", "--tokens", "35", "--heads", "4", "--head-dim", "16", "--blocks", "2"]
    path = tmp_path / "counts.json"
    assert peer_bytes.main([*arguments, "--json", str(path)]) == 0
    assert "cannot: AssertionError" in capsys.readouterr().out
    (found,) = json.loads(path.read_text())
    assert found["diffusers"] is None and found["bytes_ratio"] is None and found["planned"]["bytes"]["all_to_all"] > 0


@pytest.mark.parametrize("arguments", [["--ulysses", "1"], ["--ring", "0"], ["--meta", "--blocks", "3", "--ring", "2"]])
def test_wrong_options_are_told(arguments):
    with pytest.raises(SystemExit, match="must be"):
        peer_bytes.main(["--model", "flux", *arguments])


def count_each_kind():
    group = dist.group.WORLD.group_name
    with CollectiveCounter() as counter:
        x = torch.arange(8.0)
        wait(start_all_to_all(x, [2, 2, 2, 2], [2, 2, 2, 2], group))
        wait(start_all_gather(x, group))
        all_reduce(x, "sum", group)
        dist.all_gather([torch.empty(8) for _ in range(4)], x)
        wait(torch.ops._c10d_functional.all_to_all_single(x.view(4, 2), [1, 1, 1, 1], [1, 1, 1, 1], group))
        dist.all_to_all_single(torch.empty(4, 2), x.view(4, 2))
        dist.all_to_all_single(torch.empty(8), x, [2, 2, 2, 2], [2, 2, 2, 2])
    with CollectiveCounter(ring_group=group) as ring:
        wait(start_ring_exchange(x, 8, group))
        rank = dist.get_rank()
        neighbours = [dist.P2POp(dist.isend, x, (rank + 1) % 4), dist.P2POp(dist.irecv, torch.empty(8), (rank - 1) % 4)]
        for request in dist.batch_isend_irecv(neighbours):
            request.wait()
        with pytest.raises(NotImplementedError, match="broadcast"):
            dist.broadcast(x, 0)
    return counter.traffic, ring.traffic


def test_every_kind_is_counted_and_unknown_ones_are_refused(ranks):
    for traffic, ring in ranks.run(count_each_kind):
        assert traffic.bytes == {"all_to_all": 96, "ring": 0, "all_gather": 192, "all_reduce": 48}
        assert traffic.calls == {"all_to_all": 4, "ring": 0, "all_gather": 2, "all_reduce": 1}
        assert ring.bytes["ring"] == 64 and ring.calls["ring"] == 2
