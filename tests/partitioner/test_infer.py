"""Axis inference: which positions are the same positions, read from programs and not from lengths."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seqpar.partitioner.infer import infer
from seqpar.partitioner.lengths import Sizes
from seqpar.passes.trace import trace

sdpa = F.scaled_dot_product_attention


class Program(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *args):
        return self.fn(*args)


def heads(x):
    return x.unflatten(-1, (2, 4)).transpose(1, 2)


def attend(x):
    return sdpa(heads(x), heads(x * 2), heads(x * 3)).transpose(1, 2).flatten(2)


def read(fn, *shapes):
    """The inference, its placeholders, and the outputs of the graph."""
    inputs = tuple(torch.randn(s) if isinstance(s, tuple) else s for s in shapes)
    graph = trace(Program(fn), inputs, {}, dynamic=False).gm.graph
    inference = infer(graph, Sizes())
    return inference, [n for n in graph.nodes if n.op == "placeholder"], [n for n in graph.find_nodes(op="output")[0].args[0]]


def lengths(inference, node, dim):
    """[[factor lengths], ...] of a dim."""
    return [[inference.table.length(a) for a in f] for f in inference.axis(node, dim)]


def test_cat_and_slice_find_the_boundary():
    def fn(text, image):
        out = attend(torch.cat([text, image], 1))
        return out[:, :5], out[:, 5:]

    inference, (text, image), (text_out, image_out) = read(fn, (2, 5, 8), (2, 12, 8))
    assert inference.axis(text, 1) == inference.axis(text_out, 1) != inference.axis(image, 1) == inference.axis(image_out, 1)
    assert {inference.table.length(a) for a in inference.sequences} == {5, 12}


def test_split_and_chunk():
    def fn(x):
        a, b = attend(x).split([4, 9], 1)
        return b, a, x.chunk(2, -1)[0]

    inference, (x,), (b, a, half) = read(fn, (2, 13, 8))
    assert lengths(inference, x, 1) == [[4, 9]] and lengths(inference, a, 1) == [[4]] and lengths(inference, b, 1) == [[9]]
    assert inference.axis(half, 1) == inference.axis(x, 1)


def test_a_table_made_from_joined_positions_is_cut_like_the_sequence():
    def fn(text, image, text_ids, image_ids):
        ids = torch.cat([text_ids, image_ids])
        x = torch.cat([text, image], 1) * ids[:, None].cos()
        return attend(x), ids

    inference, (text, image, *_), (_, ids) = read(fn, (2, 5, 8), (2, 12, 8), (5,), (12,))
    assert lengths(inference, ids, 0) == [[5, 12]]
    assert inference.axis(ids, 0) == ((*inference.axis(text, 1)[0], *inference.axis(image, 1)[0]),)


@pytest.mark.parametrize("fuse", [True, False])
def test_rows_and_columns_numbered_by_one_table_are_told_apart_when_flattened(fuse):
    """Positions of a square grid: both dims are the table's, their product must not be cut in two places at once."""

    def fn(table, x):
        rows = attend(table[None])[0]
        return (rows[:, None] + rows[None]).flatten(0, 1) * x

    graph = trace(Program(fn), (torch.randn(6, 8), torch.randn(36, 8)), {}, dynamic=False).gm.graph
    inference = infer(graph, Sizes(), fuse=fuse)
    (grid,) = [n for n in inference.relations if n.target is torch.ops.aten.view.default and n.meta["val"].shape[0] == 36]
    atoms = [a for factor in inference.axis(grid, 0) for a in factor]
    assert len(atoms) == len(set(atoms)) == (1 if fuse else 2)


def test_padding_is_an_atom_of_its_own():
    inference, (x,), (out,) = read(lambda x: attend(F.pad(x, (0, 0, 0, 4)))[:, :-4], (2, 12, 8))
    assert inference.axis(x, 1) == inference.axis(out, 1)
    assert sorted(inference.table.length(a) for a in inference.sequences) == [4, 12]


def test_pad_sequence_shares_the_first_positions():
    def fn(a, b):
        return attend(nn.utils.rnn.pad_sequence([a, b], batch_first=True))

    inference, (a, b), (out,) = read(fn, (7, 8), (12, 8))
    assert lengths(inference, out, 1) == [[7, 5]]
    assert inference.axis(b, 0) == inference.axis(out, 1) and inference.axis(a, 0)[0] == inference.axis(out, 1)[0][:1]


@pytest.mark.parametrize("shape", [(2, 3, 4, 6, 8), (1, 5, 2, 2, 8)])
def test_a_flattened_grid_becomes_one_sequence(shape):
    inference, _, (out,) = read(lambda x: attend(x.flatten(1, 3)), shape)
    n = shape[1] * shape[2] * shape[3]
    assert lengths(inference, out, 1) == [[n]] and [inference.table.length(a) for a in inference.sequences] == [n]


def test_batch_times_sequence_stays_a_product():
    def fn(x):
        y = F.linear(x.flatten(0, 1), torch.eye(8))
        return attend(y.view(x.shape)), y

    inference, (x,), (_, y) = read(fn, (2, 12, 8))
    assert lengths(inference, y, 0) == [[2], [12]] and inference.axis(y, 0) == (*inference.axis(x, 0), *inference.axis(x, 1))


def test_writing_in_place_keeps_the_sequence():
    def fn(x, cos):
        out = torch.empty_like(x)
        out[..., 0::2] = x[..., 0::2] * cos
        out[..., 1::2] = x[..., 1::2] * cos
        return attend(out)

    inference, (x, cos), (out,) = read(fn, (2, 12, 8), (12, 1))
    assert inference.axis(x, 1) == inference.axis(out, 1) == inference.axis(cos, 0)


def test_equal_lengths_are_not_confused():
    def fn(x, context, pooled):
        out = sdpa(heads(x), heads(context), heads(context * 2)).transpose(1, 2).flatten(2)
        return out * pooled.sum(1, keepdim=True), context + 1, pooled

    inference, (x, context, pooled), (out, *_) = read(fn, (2, 8, 8), (2, 8, 8), (2, 8, 8))
    assert inference.axis(x, 1) == inference.axis(out, 1)
    assert len({inference.axis(n, 1) for n in (x, context, pooled)}) == 3
    assert inference.axis(x, 1)[0][0] in inference.sequences and inference.axis(pooled, 1)[0][0] not in inference.sequences
    assert inference.axis(x, 1) != inference.axis(x, 2), "sequence and features are both 8 long"


def test_shifted_positions_are_not_aligned():
    inference, (x,), (out,) = read(lambda x: attend(x[:, 1:] - x[:, :-1]), (2, 12, 8))
    assert inference.axis(x, 1) != inference.axis(out, 1)


def test_an_operator_without_a_rule_is_opaque_and_reported():
    inference, (x,), (out,) = read(lambda x: attend(torch.fft.fft(x, dim=-1).real), (2, 12, 8))
    unseen = [n for n, r in inference.relations.items() if not r.seen]
    assert unseen and inference.relations[unseen[0]].reason == "no rule for this operator"
    assert inference.axis(x, 1) != inference.axis(out, 1)


def test_inference_is_deterministic():
    def fn(text, image):
        return attend(torch.cat([text, image], 1))[:, 5:]

    texts = [{n.name: [lengths(i, n, d) for d in range(3)] for n in outs} for i, _, outs in (read(fn, (2, 5, 8), (2, 12, 8)) for _ in range(2))]
    assert texts[0] == texts[1]


def test_a_mask_filled_row_by_row_does_not_cut_the_sequence():
    """A loop over rows that writes into a table: solving took cubic time, with one atom per row."""

    def fn(x):
        length = x.shape[1]
        mask = torch.full((length, length), float("-inf"))
        for i in range(length):
            mask[i, max(0, i - 3) : i + 1] = 0.0
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], mask)

    inference, (x,), _ = read(fn, (1, 40, 8))
    assert lengths(inference, x, 1) == [[40]] and len(inference.sequences) == 1


def test_rows_of_one_table_for_two_sequences_do_not_tie_them():
    """A rotary table, sliced for the queries and for the keys of a cross-attention."""
    table = torch.randn(64, 8)

    def fn(x, context):
        queries, keys = x * table[:37], context * table[:11]
        return sdpa(heads(queries), heads(keys), heads(context)).transpose(1, 2).flatten(2)

    inference, (x, context), _ = read(fn, (2, 37, 8), (2, 11, 8))
    assert lengths(inference, x, 1) == [[37]] and lengths(inference, context, 1) == [[11]]
    assert inference.axis(x, 1) != inference.axis(context, 1)
