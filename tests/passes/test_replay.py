"""Values read from tensors: recorded, repeated while tracing, guarded at run time. The answer stays right whatever the inputs say."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seqpar.compat import unbacked_symbols
from seqpar.compile import sp_compile
from seqpar.errors import TraceError
from seqpar.models.randomise import randomise
from seqpar.passes.read_guard import ActivationRead
from seqpar.passes.reads import Positions
from seqpar.passes.trace import trace
from seqpar.tools.coverage_cases import all_cases
from seqpar.verification import verify_traced

S, C = 6, 8


def mask_of(*lengths):
    """[len(lengths), S] bool: the first entries of each row."""
    return torch.arange(S) < torch.tensor(lengths)[:, None]


def x_of(batch=2, seed=0):
    return torch.randn(batch, S, C, generator=torch.Generator().manual_seed(seed))


HOLES = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0]]).bool()
MASKS = (mask_of(4, 6), mask_of(6, 6), mask_of(3, 3), torch.zeros(2, S, dtype=torch.bool), HOLES)


def write_rows(x, mask):
    y = x.clone()
    y[mask] = torch.arange(int(mask.sum()) * C, dtype=x.dtype).view(-1, C)
    return y


def write_scaled(x, mask):
    y = x.clone()
    y[mask] *= 0.5
    y[:, mask[0]] = y[:, mask[0]] + 1
    return y


def slice_to_length(x, mask):
    keep = torch.zeros(2, S, dtype=torch.bool)
    length = mask.sum(1)
    for i in range(2):
        keep[i, : length[i]] = True
    return x * keep[..., None]


def sizes(x, mask):
    n = mask.sum() // 2
    return torch.arange(n).sum() + torch.zeros(n, 2).sum() + torch.tensor([n, n + 1]).sum() + x.narrow(1, 0, mask.sum(1).max()).sum()


def numpy_lengths(x, mask):
    ends = mask.sum(1).numpy().cumsum(0)
    return x.flatten(0, 1)[: int(ends[-1])]


def repeated(x, mask):
    twice = torch.where(mask[0], 3, 1)
    return torch.cat([x.repeat_interleave(twice, dim=1).flatten(), torch.repeat_interleave(twice).to(x.dtype), x.repeat_interleave(mask.sum(1) + 1, dim=0).flatten()])


def distinct(x, mask):
    values, inverse, counts = torch.unique(mask.sum(1), return_inverse=True, return_counts=True)
    return x[:, : int(counts.max())] * values.sum() + inverse[:, None, None]


def counted(x, mask):
    lengths = mask.sum(1)
    return F.one_hot(lengths).sum() + torch.bincount(lengths, minlength=2) * x.sum()


def checked_when_eager(x, mask):
    """Looks at the mask only where no tracer would see it, as transformers does to warn of padding."""
    if type(mask) is torch.Tensor and 0 in mask[:, 0] and mask.any():
        x = x + 0
    if 6 in mask.sum(1):
        return -x
    return x if mask.all() else x * 2


READS = {
    "bool": lambda x, mask: x * 2 if mask.all() else x,
    "item": lambda x, mask: x[:, : mask.sum(1).max().item()],
    "float": lambda x, mask: x * float(mask.float().mean()),
    "tolist": lambda x, mask: torch.cat([x[i, :n] for i, n in enumerate(mask.sum(1).tolist())]),
    "rows": lambda x, mask: x[mask],
    "rows of the complement": lambda x, mask: torch.cat([x[mask], x[~mask]]),
    "columns": lambda x, mask: x[:, mask[1]],
    "mask and number": lambda x, mask: x[mask, 0],
    "mask after ellipsis": lambda x, mask: x.transpose(1, 2)[..., mask[0]],
    "write rows": write_rows,
    "write scaled": write_scaled,
    "nonzero": lambda x, mask: x[0, torch.nonzero(mask[0]).flatten()],
    "nonzero as tuple": lambda x, mask: x[mask.nonzero(as_tuple=True)],
    "where": lambda x, mask: x[torch.where(mask)],
    "masked_select": lambda x, mask: torch.masked_select(x, mask[..., None]),
    "repeat_interleave": repeated,
    "unique": distinct,
    "equal": lambda x, mask: x if torch.equal(mask[0], mask[1]) else -x,
    "allclose": lambda x, mask: x if torch.allclose(mask[0].float(), mask[1].float()) else -x,
    "contains": lambda x, mask: x if 6 in mask.sum(1) else -x,
    "classes": counted,
    "numpy": numpy_lengths,
    "slice bounds": slice_to_length,
    "sizes": sizes,
    "float mask": lambda x, mask: x[:, : int(mask.float().sum(1).max())],
    "also eager checks": checked_when_eager,
    "shape only": lambda x, mask: x if torch.ones_like(x @ x.transpose(1, 2)).all() else -x,
}


class Model(nn.Module):
    """Applies a function between two projections."""

    def __init__(self, function):
        super().__init__()
        self.first, self.function = nn.Linear(C, C), function

    def forward(self, x, mask):
        return self.function(self.first(x), mask)


def output(traced, *inputs):
    with torch.no_grad():
        return traced.gm(*inputs)[0]


@pytest.mark.parametrize("name", READS)
def test_each_kind_of_read_is_exact_static_and_guarded(name):
    model = Model(READS[name]).eval()
    for recorded in (MASKS[0], MASKS[1], HOLES):
        traced = trace(model, (x_of(), recorded), {}, dynamic=False)
        with torch.no_grad():
            assert torch.equal(output(traced, x_of(), recorded), model(x_of(), recorded))
        sizes = [size for node in traced.gm.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor) for size in node.meta["val"].shape]
        assert all(isinstance(size, int) for size in sizes) and traced.shape_env is None
        assert (traced.guard is None) is (name == "shape only")
        for mask in MASKS:
            for x in (x_of(), x_of(seed=1)):
                if traced.guard is None or traced.guard.holds([x, mask]):
                    with torch.no_grad():
                        assert torch.equal(output(traced, x, mask), model(x, mask))
                else:
                    assert mask is not recorded


@pytest.mark.parametrize("name", ["bool", "tolist", "rows of the complement", "write rows", "repeat_interleave", "unique", "slice bounds"])
def test_changing_the_mask_between_calls_keeps_the_answer_right(name):
    model = Model(READS[name]).eval()
    fast = sp_compile(model, (x_of(), MASKS[0]), dynamic=False)
    with torch.no_grad():
        for seed, mask in enumerate((*MASKS, *MASKS)):
            assert torch.equal(fast(x_of(seed=seed), mask), model(x_of(seed=seed), mask))


class Packed(nn.Module):
    """Joint attention over the tokens of a text that its mask lets through, and an image."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, image, text, mask):
        lengths = mask.sum(1).tolist()
        outs = []
        for i, length in enumerate(lengths):
            joint = torch.cat([text[i : i + 1][:, mask[i]], image[i : i + 1]], dim=1)
            q, k, v = self.qkv(joint).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            outs.append(self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))[:, length:])
        return torch.cat(outs)


def packed_inputs(*lengths, tokens=9):
    generator = torch.Generator().manual_seed(0)
    return {"image": torch.randn(len(lengths), tokens, 16, generator=generator), "text": torch.randn(len(lengths), S, 16, generator=generator), "mask": mask_of(*lengths)}


@pytest.mark.parametrize("degrees", [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("lengths", [(4, 6), (1, 5)])
def test_partitioned_programs_are_right(degrees, lengths):
    traced = trace(randomise(Packed()).eval(), (), packed_inputs(*lengths), dynamic=False)
    report = verify_traced(traced, ulysses=degrees[0], ring=degrees[1])
    assert report.ok, report
    assert report.plan.sharded_flop_fraction > 0.75


def test_programs_are_kept_per_value_and_reused(caplog):
    model = randomise(Packed()).eval()
    fast = sp_compile(model, packed_inputs(4, 6), dynamic=False)
    with caplog.at_level(logging.INFO, "seqpar.compile"), torch.no_grad():
        caplog.clear()  # whatever the first compilation said
        for lengths in ((4, 6), (5, 5), (4, 6), (5, 5), (2, 2), (4, 6)):
            assert torch.equal(fast(**packed_inputs(*lengths)), model(**packed_inputs(*lengths)))
    messages = [record.message for record in caplog.records if record.name == "seqpar.compile"]
    assert len(messages) == 2 and all("tolist" in message and "lengths = mask.sum(1).tolist()" in message for message in messages)


def test_alternatives_are_bounded(caplog):
    fast = sp_compile(Model(READS["bool"]).eval(), (x_of(), mask_of(1, 1)), dynamic=False)
    fast._model.function = READS["tolist"]
    fast.recompile()
    fast.__dict__["_max_programs"] = 3
    with caplog.at_level(logging.WARNING, "seqpar.compile"), torch.no_grad():
        for n in range(1, 7):
            assert torch.equal(fast(x_of(), mask_of(n, n)), fast._model(x_of(), mask_of(n, n)))
    assert sum(len(found.programs) for found in fast._programs.values()) == 3


def test_a_mask_that_hides_nothing_serves_other_lengths(caplog):
    class Whole(nn.Module):
        def forward(self, x, mask):
            joint = x[:, mask]
            return F.scaled_dot_product_attention(joint, joint, joint)

    model = Whole()
    with torch.no_grad():
        fast = sp_compile(model, (torch.randn(1, 8, 4), torch.ones(8, dtype=torch.bool)), dynamic=True)
        for n, hidden in ((8, 0), (12, 0), (12, 3)):
            x, mask = torch.randn(1, n, 4), torch.arange(n) >= hidden
            assert torch.equal(fast(x, mask), model(x, mask))
    assert len({id(program) for found in fast._programs.values() for program in found.programs}) == 2
    with torch.no_grad(), caplog.at_level(logging.INFO, "seqpar.compile"):
        x, mask = torch.randn(1, 10, 4), torch.arange(10) >= 3
        assert torch.equal(fast(x, mask), model(x, mask))
    assert "was compiled" in caplog.text and "is reused" not in caplog.text  # the one that hides nothing has the right sizes, and other values


class Gated(nn.Module):
    """Its control flow depends on an activation."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(C, 2)

    def forward(self, x, mask):
        chosen = self.gate(x).argmax(-1).flatten()
        order = chosen.argsort()
        return x.flatten(0, 1)[order].split(chosen.bincount(minlength=2).tolist())[0]


class Dropped(nn.Module):
    def forward(self, x, mask):
        return x if torch.rand(()).item() < 2 else -x


class Fractions(nn.Module):
    def forward(self, x, mask):
        return x[:, : int((x.numpy() > 0).sum()) // 20]


class Unknown(nn.Module):
    """The tracer copes with it, but one of its tensors has no length."""

    def forward(self, x, mask):
        return F.scaled_dot_product_attention(x, x, x).sum() + x[x[..., 0] > 0]


@pytest.mark.parametrize(
    ("model", "words"), [(Gated(), ("bincount", "split(chosen", "activation")), (Dropped(), ("item", "torch.rand", "random")), (Fractions(), ("numpy", "x.numpy() > 0", "input x"))]
)
def test_reads_that_no_program_can_rely_on_are_refused(model, words):
    with pytest.raises(TraceError) as caught:
        trace(model, (x_of(), mask_of(4, 6)), {}, dynamic=False)
    assert isinstance(caught.value, ActivationRead) and "test_replay.py" in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_sizes_that_depend_on_activations_stay_unknown_on_one_rank_and_are_refused_on_several():
    traced = trace(Unknown(), (x_of(), mask_of(6, 6)), {}, dynamic=False)
    with torch.no_grad():
        assert torch.equal(output(traced, x_of(seed=1), mask_of(6, 6)), Unknown()(x_of(seed=1), mask_of(6, 6)))
    with pytest.raises(TraceError, match=r"x\[x\[..., 0\] > 0\]"):
        verify_traced(traced, ulysses=1, ring=2)


def test_a_number_that_decides_nothing_stays_a_symbol(caplog):
    class Scaled(nn.Module):
        def forward(self, x, scale, mask):
            y = x[:, : int(mask.sum())] * scale.item()
            return F.scaled_dot_product_attention(y, y, y)

    model, mask = Scaled(), mask_of(5)[0]
    fast = sp_compile(model, (x_of(), torch.tensor(0.3), mask), dynamic=False)
    with torch.no_grad():
        for scale in (0.3, 1.7, -2.0):
            assert torch.equal(fast(x_of(), torch.tensor(scale), mask), model(x_of(), torch.tensor(scale), mask))
    assert not fast._current.others
    assert verify_traced(trace(model, (x_of(), torch.tensor(0.3), mask), {}, dynamic=False), ulysses=1, ring=2).ok


def test_conditions_on_inputs_and_parameters_are_guarded():
    class Conditions(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x, t):
            self.calls += 1
            y = x.sin() if (x.abs() > 2).any() else x.cos()
            y = y if self.gain > 0 else -y
            return y * 3 if t[0] < 500 and self.calls % 2 == 0 else y

    model, twin = Conditions(), Conditions()
    fast = sp_compile(model, (torch.ones(3), torch.tensor([500.0])), dynamic=False)
    with torch.no_grad():
        for step, (scale, t, gain) in enumerate([(1, 900, 1), (3, 900, 1), (3, 100, 1), (3, 100, -1), (1, 100, -1), (1, 900, 1)] * 2):
            for copy in (model, twin):
                copy.gain.fill_(gain)
            x, time = torch.full((3,), scale / 1.0), torch.tensor([float(t)])
            assert torch.equal(fast(x, time), twin(x, time)), step


def test_a_table_read_only_once_is_no_read():
    class Memo(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = {}

        def forward(self, x, mask):
            if "n" not in self.tables:
                self.tables["n"] = torch.arange(int(mask.sum()))[: x.shape[1]]
            return x + self.tables["n"].sum()

    traced = trace(Memo(), (x_of(), mask_of(6, 6)), {}, dynamic=False)
    assert traced.guard is None and traced.reads == ()


def test_a_write_through_data_is_seen():
    def add_head(x, mask):
        y = x.new_zeros(x.shape)
        y.data[:, 2:].copy_(x[:, 2:])
        return x + y

    model = Model(add_head)
    traced = trace(model, (x_of(), mask_of(6, 6)), {}, dynamic=False)
    with torch.no_grad():
        assert torch.equal(output(traced, x_of(seed=1), mask_of(6, 6)), model(x_of(seed=1), mask_of(6, 6)))


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 2, 4)])
def test_positions(shape):
    for seed in range(5):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.2 * seed
        columns = [torch.tensor(column, dtype=torch.int64) for column in Positions.of(mask).columns(shape)]
        assert all(torch.equal(a, b) for a, b in zip(columns, mask.nonzero(as_tuple=True), strict=True))


REAL = {case.name: case for case in all_cases()}


def other_content(inputs):
    """The same call with other masks: the last text position of every sample is hidden as well."""
    changed = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and "mask" in name and value.dim() == 2 and name != "img_mask":
            value = value.clone()
            value[:, -3:] = 0
        changed[name] = value
    return changed


@pytest.mark.parametrize(
    "name",
    ["HunyuanVideo15Transformer3DModel", "Lumina2Transformer2DModel", "OmniGenTransformer2DModel", "HunyuanImageTransformer2DModel", "QwenImage21Transformer2DModel", "GlmImageTransformer2DModel"],
)
def test_published_models(name):
    model, inputs = REAL[name].build(), REAL[name].inputs("even")
    fast = sp_compile(model, inputs, dynamic=False)
    traced = fast._current.program.traced
    assert traced.reads and not any(unbacked_symbols(size) for node in traced.gm.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor) for size in node.meta["val"].shape)
    with torch.no_grad():
        for call in (inputs, other_content(inputs), inputs):
            assert torch.equal(fast(**call)[0], model(**call)[0])


def changed_mask_on_ranks(ulysses, ring):
    model = randomise(Packed()).eval()
    with torch.no_grad():
        fast = sp_compile(model, packed_inputs(4, 6), ulysses=ulysses, ring=ring, dynamic=False)
        calls = [packed_inputs(*lengths) for lengths in ((4, 6), (5, 5), (4, 6), (2, 3), (5, 5))]
        return max((fast(**call) - model(**call)).abs().max().item() for call in calls)


def test_real_ranks_respecialise_together(two_ranks):
    assert max(two_ranks.run(changed_mask_on_ranks, 2, 1)) < 1e-5
    assert max(two_ranks.run(changed_mask_on_ranks, 1, 2)) < 1e-5
