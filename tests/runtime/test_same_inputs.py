"""The first rank's tensors and random numbers for all, on real ranks."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from seqpar.errors import DisagreementError
from seqpar.runtime.mesh import SequenceMesh, build_mesh
from seqpar.runtime.same_inputs import SameInputs, agree, first_ranks_random_numbers, from_first_rank, relative_difference

DTYPES = (torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.bool)


class CountBroadcasts:
    """While active, the bytes of every broadcast."""

    def __enter__(self):
        self.sent, self._plain = [], dist.broadcast
        dist.broadcast = self._noted
        return self.sent

    def _noted(self, tensor, *args, **kwargs):
        self.sent.append(tensor.nbytes)
        return self._plain(tensor, *args, **kwargs)

    def __exit__(self, *_):
        dist.broadcast = self._plain


def nearly_same(rank):
    """Tensors that differ between ranks by no more than rounding: views, an expanded one and an empty one among them."""
    base = torch.arange(1, 13.0).reshape(3, 4) + rank * 1e-6
    return {"x": base, "t": base.t()[1:], "wide": base[0, :1].expand(5), "one": base[:1, 0].expand(1), "none": base[:0]}


def share():
    rank = dist.get_rank()
    mesh = build_mesh(2, 2, device_type="cpu")
    same, tensors = SameInputs(mesh), nearly_same(rank)
    made = torch.full((3,), 5.0)
    same.known([made])
    with CountBroadcasts() as sent:
        given = [same({**tensors, "made": made}, "a call") for _ in range(2)]
        untouched = given[1]["made"] is made
        made.add_(rank)
        written = same({"made": made}, "a call")["made"]
        same({}, "a call")
    return given[0], tensors, sent, untouched, written


@pytest.fixture(scope="module")
def shared(ranks):
    return ranks.run(share)


def test_all_ranks_have_the_first_ones_bits(shared):
    for name, expected in nearly_same(0).items():
        assert all(torch.equal(given[name], expected) for given, *_ in shared)
    assert not torch.equal(shared[3][1]["x"], shared[0][1]["x"]), "the last rank's own are what they were"


def test_known_tensors_are_not_sent_until_they_are_written_to(shared):
    size = sum(tensor.nbytes for tensor in nearly_same(0).values())
    for _, _, sent, untouched, written in shared:
        assert sent == [size, size, 12] and untouched
        assert torch.equal(written, torch.full((3,), 5.0)), "the first rank's, which added nothing"


def share_dtypes():
    mesh = build_mesh(1, 4, device_type="cpu")
    values = torch.arange(6).reshape(2, 3) + dist.get_rank()
    return from_first_rank([values.to(dtype) for dtype in DTYPES], mesh)


def test_dtypes(ranks):
    for received in ranks.run(share_dtypes):
        assert all(torch.equal(value, torch.arange(6).reshape(2, 3).to(dtype)) for value, dtype in zip(received, DTYPES, strict=True))


def disagree(kind):
    rank, mesh = dist.get_rank(), build_mesh(2, 2, device_type="cpu")
    x = torch.ones(2, 3) * (2.0 if kind == "value" and rank == 3 else 1.0)
    SameInputs(mesh)({"y": torch.ones(1), "x": x}, f"x: {3 if kind == 'text' and rank == 1 else 2}\nscale: 1.0")


@pytest.mark.parametrize(("kind", "message"), [("value", "x differs by 100%"), ("text", r"rank\(s\) \[1\] differ from them: 'x: 3' instead of 'x: 2'")])
def test_different_requests_are_an_error_on_every_rank(ranks, kind, message):
    for outcome in ranks.outcomes(disagree, kind):
        with pytest.raises(DisagreementError, match=message):
            raise outcome


def draw_numbers():
    rank, mesh = dist.get_rank(), build_mesh(2, 2, device_type="cpu")
    torch.manual_seed(rank)
    generator = torch.Generator().manual_seed(10 + rank)
    with first_ranks_random_numbers([generator], mesh):
        inside = torch.rand(1).item(), torch.rand(1, generator=generator).item()
    return inside, torch.rand(1).item(), torch.rand(1, generator=generator).item()


def test_random_numbers(ranks):
    results = ranks.run(draw_numbers)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(10)
    expected = torch.rand(1).item(), torch.rand(1, generator=generator).item()
    assert [inside for inside, *_ in results] == [expected] * 4
    assert results[0][1] == torch.rand(1).item(), "the first rank's go on"
    for rank, (_, after, generated) in enumerate(results[1:], 1):
        torch.manual_seed(rank)
        assert after == torch.rand(1).item(), "as if nothing was drawn"
        assert generated == results[0][2], "a generator of the caller's is the first rank's from now on"


def draw_with_another_number_of_generators():
    mesh = build_mesh(2, 2, device_type="cpu")
    with first_ranks_random_numbers([torch.Generator()] * (dist.get_rank() == 2), mesh):
        pass


def test_generators_on_some_ranks_only_are_an_error(ranks):
    outcomes = ranks.outcomes(draw_with_another_number_of_generators)
    assert all(isinstance(outcome, DisagreementError) and "generators" in str(outcome) for outcome in outcomes)


def test_one_rank_needs_no_group():
    alone = SequenceMesh(1, 1, 0, {}, None)
    x = torch.ones(2)
    agree("anything", alone)
    assert from_first_rank([x], alone)[0] is x and SameInputs(alone)({"x": x}, "")["x"] is x
    with first_ranks_random_numbers([], alone), nullcontext():
        pass


def test_relative_difference():
    x = torch.tensor([3.0, 4.0])
    assert relative_difference(x, x.clone()) == relative_difference(x[:0], x[:0].clone()) == 0
    assert relative_difference(x * 1.5, x) == pytest.approx(0.5)
    assert relative_difference(torch.tensor([True]), torch.tensor([False])) > 1
    assert relative_difference(torch.zeros(2), torch.zeros(2)) == 0
