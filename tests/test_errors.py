"""Whatever a user can get wrong says what, where and what to do next; all of it derives from one class."""

import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import seqpar
from seqpar.errors import DisagreementError, MeshError, SeqparError, SignatureError, TraceError, UnsupportedError
from seqpar.models import registry
from seqpar.models.randomise import randomise


class Attention(nn.Module):
    """Self-attention with a place for everything that may go wrong; x [B, S, 16]."""

    def __init__(self, heads=4, dropout=0.0, attention_dropout=0.0):
        super().__init__()
        self.heads, self.attention_dropout = heads, attention_dropout
        self.qkv, self.out, self.dropout = nn.Linear(16, 48), nn.Linear(16, 16), nn.Dropout(dropout)

    def forward(self, x, extra=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        p = self.attention_dropout if self.training else 0.0
        y = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).flatten(2)
        y = self.dropout(self.out(y))
        return y if extra is None else y + extra["bias"][0]


class ReadsData(Attention):
    def forward(self, x):
        if self.out(x).sum() > 0:  # the line the message must show
            x = x + 1
        return super().forward(x)


class Noisy(Attention):
    def forward(self, x):
        return super().forward(x) + torch.randn_like(x)


class Pointwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(16, 16)

    def forward(self, x):
        return self.proj(x)


@torch.library.custom_op("seqpar_test_errors::swirl", mutates_args=())
def swirl(x: torch.Tensor) -> torch.Tensor:
    """An operator of the user's own, not written in operators: seqpar cannot know that it mixes positions."""
    return torch.from_numpy(x.numpy()[:, ::-1] + x.numpy().mean(1, keepdims=True))


swirl.register_fake(torch.empty_like)


class Unknown(Attention):
    def forward(self, x):
        return super().forward(x + swirl(x * 2))


def x_of(length=8, batch=2):
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(length))


def test_one_base_class():
    for error in (TraceError, SignatureError, MeshError, UnsupportedError, DisagreementError):
        assert issubclass(error, SeqparError) and seqpar.SeqparError is SeqparError


def test_no_process_group_says_how_to_launch():
    with pytest.raises(MeshError, match="torchrun --nproc-per-node 4"):
        seqpar.sp_compile(Attention(), (x_of(),), ulysses=2, ring=2)


@pytest.mark.parametrize("entry", [seqpar.sp_compile, seqpar.plan, seqpar.verify])
@pytest.mark.parametrize("degrees", [{"ulysses": 0}, {"ring": 0}, {"ring": -2}, {"ulysses": 2.0}])
def test_degrees_below_one(entry, degrees):
    with pytest.raises(MeshError, match=f"{next(iter(degrees))} must be"):
        entry(Attention().eval(), (x_of(),), **degrees)


@pytest.mark.parametrize("entry", [seqpar.plan, seqpar.verify])
def test_more_ulysses_than_heads_is_no_error(entry):
    entry(Attention(heads=4).eval(), (x_of(32),), ulysses=8)


@pytest.mark.parametrize("name", ["flux", "bagel", "wan"])
def test_more_ulysses_than_heads_in_real_models(name):
    family = registry.get(name)
    config = family.tiny_config(3, 1)
    inputs = family.grid_inputs(config, rows=4, columns=4, text_len=8, device="meta")
    assert seqpar.plan(family.build(config, device="meta"), inputs, ulysses=4).sharded_flop_fraction > 0


def test_nothing_to_shard_is_a_plan():
    plan = seqpar.plan(Pointwise(), (x_of(),), ulysses=2, ring=2)
    assert plan.nothing_to_shard and "nothing to shard" in plan.explain()
    assert seqpar.verify(Pointwise(), (x_of(),), ulysses=2, ring=2).ok


@pytest.mark.parametrize("entry", [seqpar.sp_compile, seqpar.plan, seqpar.verify])
def test_trace_failure_names_operator_line_and_remedy(entry):
    with pytest.raises(TraceError) as caught:
        entry(ReadsData().eval(), (x_of(),))
    message = str(caught.value)
    assert "if self.out(x).sum() > 0:" in message and "test_errors.py" in message
    assert "operator:" in message and "Python argument" in message


def test_a_model_that_fails_by_itself_says_so():
    with pytest.raises(TraceError, match="fails on the example inputs"):
        seqpar.plan(Attention().eval(), (torch.randn(2, 8, 15),), ulysses=2)


@pytest.mark.parametrize("ring", [1, 2])
@pytest.mark.parametrize("kwargs", [{"dropout": 0.5}, {"attention_dropout": 0.5}])
def test_dropout_while_training_is_refused(kwargs, ring):
    model = randomise(Attention(**kwargs))
    with pytest.raises(UnsupportedError, match=r"(?s)random numbers.*test_errors.py.*eval\(\)"):
        seqpar.verify(model.train(), (x_of(),), ulysses=2, ring=ring)
    assert seqpar.verify(model.eval(), (x_of(),), ulysses=2, ring=ring).ok


def test_training_without_dropout_is_fine_and_noise_is_refused():
    assert seqpar.verify(randomise(Attention()).train(), (x_of(),), ulysses=2, ring=2).ok
    with pytest.raises(UnsupportedError, match="(?s)randn_like.*test_errors.py"):
        seqpar.verify(Noisy().eval(), (x_of(),), ulysses=2)


def test_an_operator_without_a_rule_is_replicated_and_listed():
    report = seqpar.verify(randomise(Unknown()).eval(), (x_of(9),), ulysses=2, ring=2)
    assert report.ok, str(report)
    listed = [op for op in report.plan.replicated_ops if "swirl" in op.op]
    assert [op.reason for op in listed] == ["no rule for this operator"] and listed[0].source.partition(":")[0].endswith("test_errors.py")
    assert "not counted: what 1 x seqpar_test_errors.swirl.default do, whole on every rank" in report.plan.explain()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda f: f([x_of()]), "x is a list"),
        (lambda f: f(), "missing a required argument"),
        (lambda f: f(x_of(), other=1), "unexpected keyword argument 'other'"),
        (lambda f: f(x_of(), None), "extra is None"),
        (lambda f: f(x_of(), {"bias": (x_of(),)}), r"extra\['bias'\] is a tuple"),
        (lambda f: f(x_of(), {"gain": [x_of()]}), "extra has the keys"),
        (lambda f: f(x_of(), {"bias": [None]}), r"extra\['bias'\]\[0\] is None"),
    ],
)
def test_inputs_of_another_structure(call, words):
    fast = seqpar.sp_compile(Attention().eval(), (x_of(), {"bias": [x_of()]}), dynamic=False)
    with pytest.raises(SignatureError, match=words):
        call(fast)


def test_example_inputs_that_are_neither_tuple_nor_dict():
    for entry in (seqpar.sp_compile, seqpar.plan, seqpar.verify):
        with pytest.raises(SignatureError, match="tuple of positional or a dict"):
            entry(Attention(), x_of())


# ---- on real ranks: module-level functions are sent to them


def compile_with(ulysses, ring, shape=None, names=None):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names) if shape else None
    seqpar.sp_compile(Attention().eval(), (x_of(),), ulysses=ulysses, ring=ring, mesh=mesh, dynamic=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((3, 1), "world of 4 processes is not a multiple of ulysses"),
        ((4, 2), "not a multiple"),
        ((2, 1, (4,), ("tp",)), "needs a mesh dim named 'ulysses'"),
        ((1, 2, (4,), ("ulysses",)), "needs a mesh dim named 'ring'"),
        ((2, 1, (4,), ("ulysses",)), "has size 4"),
    ],
)
def test_meshes_that_do_not_fit(ranks, arguments, words):
    for outcome in ranks.outcomes(compile_with, *arguments):
        with pytest.raises(MeshError, match=words):
            raise outcome


def without_attention():
    model = Pointwise()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = seqpar.sp_compile(model, (x_of(),), ulysses=2, ring=2)
    same = torch.equal(fast(x_of()), model(x_of())) and torch.equal(fast(x_of(5)), model(x_of(5)))
    return [str(w.message) for w in caught if "nothing to shard" in str(w.message)], same


def test_a_model_without_attention_warns_and_works(ranks):
    for messages, same in ranks.run(without_attention):
        assert same and len(messages) == 1 and "Pointwise" in messages[0]


def different(what):
    rank = dist.get_rank()
    model = Attention(heads=2 if what == "heads" and rank == 1 else 4).eval()
    if what == "layers" and rank == 2:
        model.more = nn.Linear(3, 5)
    if what == "mode" and rank == 3:
        model.train()
    length = 9 if what == "shape" and rank == 3 else 8
    ring = 1 if what == "degrees" and rank == 0 else 2
    started = time.monotonic()
    try:
        seqpar.sp_compile(model, (x_of(length),), ulysses=4 // ring, ring=ring, dynamic=False)
    except SeqparError as error:
        return time.monotonic() - started, type(error).__name__, str(error)
    return None


@pytest.mark.parametrize(
    ("what", "words"), [("heads", "traced graph"), ("layers", "more.weight: (5, 3)"), ("mode", "training=True"), ("shape", "x: (2, 9, 16)")]
)
def test_ranks_that_differ_are_an_error_everywhere_within_seconds(ranks, what, words):
    results = ranks.run(different, what)
    assert all(result is not None for result in results), results
    for seconds, kind, message in results:
        assert kind == "DisagreementError" and words in message and "rank(s) [" in message
        assert seconds < 45  # most of it is tracing, on a busy machine


def later_call_differs():
    fast = seqpar.sp_compile(Attention().eval(), (x_of(),), ulysses=2, ring=2, dynamic=False)
    fast(x_of())
    fast(x_of(10 if dist.get_rank() == 1 else 9))


def test_a_later_call_with_other_shapes_on_one_rank(ranks):
    for outcome in ranks.outcomes(later_call_differs):
        with pytest.raises(DisagreementError, match=r"\(2, (9|10), 16\)"):
            raise outcome


def sharded_weights():
    """What the entries say to a model that fully_shard has divided."""
    model = Attention().eval()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    messages = []
    for entry in (seqpar.sp_compile, seqpar.plan):
        with pytest.raises(UnsupportedError) as caught:
            entry(model, (x_of(),), ulysses=2)
        messages.append(str(caught.value))
    return messages


@pytest.mark.parametrize("make", [lambda: torch.jit.script(nn.Linear(16, 16)), lambda: packed(nn.Linear(16, 16))], ids=["scripted", "packed"])
def test_objects_of_torchscript_are_refused_by_name(make):
    model = Attention().eval()
    model.out = make()
    with pytest.raises(UnsupportedError, match=r"^out\b.* of Attention is an object of TorchScript"):
        seqpar.plan(model, (x_of(),), ulysses=2)


def packed(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer))[0]


def test_weights_that_are_divided_already_are_refused(two_ranks):
    for messages in two_ranks.run(sharded_weights):
        assert all("qkv.weight of FSDPAttention is a DTensor (Shard(dim=0),)" in message and "whole weights" in message for message in messages)
