"""Models whose weights are stored in fewer bits than they compute with: tensor classes like those of torchao, quanto and GGUF."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqpar
from seqpar.errors import SavedProgramError, TraceError
from seqpar.models import registry
from seqpar.partitioner.cost import Machine

WIDTH, HEADS = 32, 4
SLOW = Machine(flops_per_s=1e9, bytes_per_s=1e8)
INPUTS = {"x": torch.randn(2, 37, WIDTH, generator=torch.Generator().manual_seed(0))}


class Int8(Tensor):
    """Numbers as int8 and a scale per row, made of two tensors that its class computes with, as torchao and quanto have them."""

    @staticmethod
    def __new__(cls, data, scale):
        return Tensor._make_wrapper_subclass(cls, data.shape, strides=data.stride(), dtype=scale.dtype, device=data.device)

    def __init__(self, data, scale):
        self.data_int8, self.scale = data, scale

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(-1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self):
        return ["data_int8", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, outer_size, outer_stride):
        return Int8(inner["data_int8"], inner["scale"])

    def whole(self):
        return self.data_int8 * self.scale

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.whole(), *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
            return cls(*(function(part, **({} if part.dtype == torch.int8 else kwargs or {})) for part in (args[0].data_int8, args[0].scale)))
        raise NotImplementedError(f"{function} of quantised numbers")


class Nested(Int8):
    """One whose scale is such a tensor itself."""

    @classmethod
    def of(cls, weight):
        plain = Int8.of(weight)
        return cls(plain.data_int8, Int8.of(plain.scale))

    @staticmethod
    def __tensor_unflatten__(inner, context, outer_size, outer_stride):
        return Nested(inner["data_int8"], inner["scale"])

    def whole(self):
        return self.data_int8 * self.scale.whole()


class Signed(Int8):
    """One that says something about its numbers."""

    sign = 1

    def __tensor_flatten__(self):
        return ["data_int8", "scale"], self.sign

    @staticmethod
    def __tensor_unflatten__(inner, context, outer_size, outer_stride):
        made = Signed(inner["data_int8"], inner["scale"])
        made.sign = context
        return made

    def whole(self):
        return super().whole() * self.sign


class Bytes(nn.Parameter):
    """Bytes that know how they are packed, as GGUF's: a tensor with attributes, whose class does not say what it is made of."""

    def __new__(cls, data, scale=None):
        made = Tensor._make_subclass(cls, data, False)
        made.scale = scale
        return made

    def as_tensor(self):
        return Tensor._make_subclass(Tensor, self, False)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return cls(result, args[0].scale) if isinstance(result, Tensor) and isinstance(args[0], Bytes) else result


class Unpacking(nn.Linear):
    """A layer that unpacks: 4 bits a number. `after`: as a plain tensor only after its first step."""

    after = False

    def forward(self, x):
        low = (self.weight & 15).as_tensor() if self.after else self.weight.as_tensor() & 15
        packed = self.weight.as_tensor()
        return F.linear(x, (torch.stack([low, packed >> 4], -1).flatten(-2).to(x.dtype) - 8) * self.weight.scale, self.bias)

    @classmethod
    def of(cls, layer):
        made = cls(layer.in_features, layer.out_features)
        scale = layer.weight.abs().max().item() / 7
        numbers = ((layer.weight / scale).round() + 8).to(torch.uint8)
        made.weight, made.bias = Bytes(numbers[:, ::2] | numbers[:, 1::2] << 4, scale), layer.bias
        return made


class UnpackingAfter(Unpacking):
    after = True


class Dynamic(nn.Module):
    """A layer that quantises every row of its input, and multiplies integers."""

    def __init__(self, layer):
        super().__init__()
        scale = layer.weight.detach().abs().amax(-1) / 127
        self.register_buffer("weight", (layer.weight.detach() / scale[:, None]).round().to(torch.int8).t().contiguous())
        self.register_buffer("scale", scale)

    def forward(self, x):
        rows = x.flatten(0, -2)
        by_row = rows.abs().amax(-1, keepdim=True) / 127
        return (torch._int_mm((rows / by_row).round().to(torch.int8), self.weight) * by_row * self.scale).unflatten(0, x.shape[:-1])


@torch.library.custom_op("seqpar_tests::linear_in_int8", mutates_args=())
def linear_in_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """An operator of another library, written in Python."""
    return F.linear(x, weight.to(x.dtype) * scale) * (1 if x.shape[1] > 20 else 0)  # it decides by the whole length


@linear_in_int8.register_fake
def _(x, weight, scale):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class ByOperator(nn.Module):
    def __init__(self, layer):
        super().__init__()
        quantised = Int8.of(layer.weight.detach())
        self.register_buffer("weight", quantised.data_int8)
        self.register_buffer("scale", quantised.scale)

    def forward(self, x):
        return linear_in_int8(x, self.weight, self.scale)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def model(quantise):
    torch.manual_seed(0)
    made = Model().eval()
    for block in made.blocks:
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(block, name, quantise(layer))
    return made


def with_weight(kind):
    def quantise(layer):
        layer.weight = nn.Parameter(kind.of(layer.weight.detach()), requires_grad=False)
        return layer

    return quantise


QUANTISED = {"wrapper": with_weight(Int8), "nested": with_weight(Nested), "attributes": Unpacking.of, "attributes, late": UnpackingAfter.of, "integers": Dynamic, "operator": ByOperator}


@pytest.mark.parametrize("mesh", [{"ulysses": 2}, {"ring": 2}, {"ulysses": 2, "ring": 2}], ids=str)
@pytest.mark.parametrize("kind", QUANTISED)
def test_as_parallel_as_the_model_in_float32(kind, mesh):
    quantised = model(QUANTISED[kind])
    with torch.no_grad():
        assert quantised(**INPUTS).std() > 0.1
    report = seqpar.verify(quantised, INPUTS, **mesh)
    # Where activations are rounded to integers, their last bits decide some of them.
    assert report.ok or (kind == "integers" and report.rounding is not None and report.max_rel_err < 3 * report.rounding < 0.05), report
    whole = seqpar.plan(model(lambda layer: layer), INPUTS, **mesh)
    assert report.plan.sharded_flop_fraction == whole.sharded_flop_fraction > 0.97
    assert report.plan.flops_total == whole.flops_total and report.plan.comm_bytes_per_rank == whole.comm_bytes_per_rank
    assert not report.plan.replicated_ops


@pytest.mark.parametrize("kind", ["wrapper", "attributes"])
def test_lengths_that_change_and_weights_that_do(kind):
    quantised = model(QUANTISED[kind])
    fast = seqpar.sp_compile(quantised, INPUTS)
    with torch.no_grad():
        for length in (37, 12):
            x = torch.randn(2, length, WIDTH)
            torch.testing.assert_close(fast(x), quantised(x))
        quantised.blocks[0].out.weight = model(QUANTISED[kind]).blocks[1].out.weight
        torch.testing.assert_close(fast(x), quantised(x))
        if kind == "attributes":
            quantised.blocks[0].up.weight.scale *= 2
            torch.testing.assert_close(fast(x), quantised(x))
        quantised.blocks[1] = Block().eval()
        torch.testing.assert_close(fast(x), quantised(x))


def test_another_weight_of_the_same_class():
    quantised = model(with_weight(Signed))
    fast = seqpar.sp_compile(quantised, INPUTS, dynamic=False)
    first = fast.graph_module
    with torch.no_grad():
        for sign in (1, -1):
            weight = nn.Parameter(Signed.of(torch.randn(WIDTH, WIDTH) / 9), requires_grad=False)
            weight.sign = sign
            quantised.blocks[0].out.weight = weight
            torch.testing.assert_close(fast(**INPUTS), quantised(**INPUTS))
            assert (fast.graph_module is first) == (sign == 1)  # numbers are read anew, what is said of them is part of a program


@pytest.mark.parametrize("kind", ["wrapper", "attributes"])
def test_one_weight_in_two_places(kind):
    class Tied(Block):
        def forward(self, x):
            return super().forward(x) * (2 if self.out.weight is self.again.weight else 1)

    quantised = model(QUANTISED[kind])
    block = quantised.blocks[0]
    block.__class__, block.again = Tied, nn.Module()
    block.again.weight = block.out.weight
    assert seqpar.verify(quantised, INPUTS, ulysses=2).ok


@pytest.mark.parametrize("change", [lambda weight: setattr(weight, "count", getattr(weight, "count", 0) + 1), lambda weight: weight.as_tensor().add_(0)], ids=["attribute", "content"])
def test_weights_that_a_call_changes_are_refused(change):
    class Counting(Unpacking):
        def forward(self, x):
            change(self.weight)
            return super().forward(x)

    with pytest.raises(TraceError, match="changes the attribute count of its weight blocks.0|writes to a quantised weight"):
        seqpar.plan(model(Counting.of), INPUTS, ulysses=2)


def test_quantised_after_compiling_and_back():
    plain = model(lambda layer: layer)
    fast = seqpar.sp_compile(plain, INPUTS)
    with torch.no_grad():
        weights = {path: weight.detach() for path, weight in plain.named_parameters() if weight.dim() == 2}
        for path in weights:
            plain.get_submodule(path.removesuffix(".weight")).weight = nn.Parameter(Int8.of(weights[path]), requires_grad=False)
        fast.recompile()
        torch.testing.assert_close(fast(**INPUTS), plain(**INPUTS))
        for path, weight in weights.items():
            plain.get_submodule(path.removesuffix(".weight")).weight = nn.Parameter(weight)
        torch.testing.assert_close(fast(**INPUTS), plain(**INPUTS))


def test_the_memory_of_weights_is_what_they_hold():
    small, large = (seqpar.plan(model(kind), INPUTS, ulysses=2).inspector.memory.parameters for kind in (with_weight(Int8), lambda layer: layer))
    assert 0.25 < small / large < 0.35


def test_saved_and_loaded(tmp_path):
    quantised = model(with_weight(Nested))
    seqpar.sp_compile(quantised, INPUTS).save(tmp_path / "program")
    fast = seqpar.load(tmp_path / "program", quantised)
    with torch.no_grad():
        torch.testing.assert_close(fast(**INPUTS), quantised(**INPUTS))
    with pytest.raises(SavedProgramError):
        seqpar.load(tmp_path / "program", model(lambda layer: layer))
    with pytest.raises(SavedProgramError, match="GGUF"):
        seqpar.sp_compile(model(Unpacking.of), INPUTS).save(tmp_path / "other")


def test_a_choice_by_activations_is_not_taken_for_one_by_inputs():
    class Choosing(Model):
        def forward(self, x):
            return super().forward(x) if self.blocks[0].up(x).sum() > 0 else x

    quantised = model(with_weight(Int8))
    quantised.__class__ = Choosing
    with pytest.raises(TraceError, match="activation"):
        seqpar.plan(quantised, INPUTS, ulysses=2)


def results_of(kind, backend):
    quantised = model(QUANTISED[kind])
    fast = seqpar.sp_compile(quantised, INPUTS, ulysses=2, backend=backend)
    with torch.no_grad():
        return fast(**INPUTS), quantised(**INPUTS)


def results_by_dynamo(kind):
    quantised = model(QUANTISED[kind])
    fast = torch.compile(quantised, backend="seqpar", options={"ulysses": 2, "backend": "aot_eager"})
    with torch.no_grad():
        return fast(**INPUTS), quantised(**INPUTS)


@pytest.mark.parametrize("kind", ["wrapper", "nested", "attributes"])
def test_as_a_backend_of_torch_compile(two_ranks, kind):
    for result, expected in two_ranks.run(results_by_dynamo, kind):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "backend"), [("wrapper", None), ("nested", "aot_eager"), ("attributes", "aot_eager")])
def test_on_real_ranks(two_ranks, kind, backend):
    for result, expected in two_ranks.run(results_of, kind, backend):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_whole_weights_made_of_one_another():
    """Quantised as they are used: the numbers depend on the scale, and the weight on both."""

    class Rounding(nn.Linear):
        def forward(self, x):
            scale = self.weight.abs().amax(-1, keepdim=True) / 127
            return F.linear(x, (self.weight / scale).round() * scale, self.bias)

    def rounding(layer):
        layer.__class__ = Rounding
        return layer

    report = seqpar.verify(model(rounding), INPUTS, ulysses=2, ring=2)
    assert report.ok, report


def test_whole_weights_do_not_hinder_overlap():
    """Whole weights made of quantised ones come one by one, and exchanges are hidden as with weights in float32."""
    plans = []
    for quantise in (with_weight(Int8), lambda layer: layer):
        torch.manual_seed(0)
        flux = registry.get("flux").build()
        for layer in [layer for layer in flux.modules() if isinstance(layer, nn.Linear)]:
            quantise(layer)
        plans.append(seqpar.plan(flux, registry.get("flux").example_inputs(height=256, width=256), ulysses=2, hardware=SLOW))
    quantised, plain = plans
    assert sum(plain.predicted_hidden.values()) > 0 and quantised.predicted_hidden == plain.predicted_hidden
    whole = max(parameter.numel() for parameter in flux.parameters()) * 4
    assert quantised.inspector.memory.peak <= plain.inspector.memory.peak + 3 * whole
