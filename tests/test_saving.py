"""Programs in files: what is loaded computes what was compiled, without a trace; what does not fit is an error that says what."""

import dataclasses
import json
import shutil
import time
import zipfile

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import seqpar
from seqpar.errors import MeshError, SavedProgramError, UnsupportedError
from seqpar.models import registry
from seqpar.models.randomise import randomise
from seqpar.passes.plan import Plan

WIDTH = 16


class Router(nn.Module):
    """Branches on activations: runs as it is."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, 2), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x, scale):
        chosen = self.gate(x).argmax(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if (chosen == i).any().item():
                y = torch.where((chosen == i)[..., None], expert(x) * scale, y)
        return y


class Everything(nn.Module):
    """Reads a mask, holds a constant, counts its calls in a buffer, routes by activations, returns a dict."""

    def __init__(self, scale=0.5):
        super().__init__()
        self.qkv, self.router, self.scale = nn.Linear(WIDTH, 3 * WIDTH), Router(), scale
        self.table = torch.linspace(-1, 1, WIDTH)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, mask, text="a"):
        self.calls.add_(1)
        length = int(mask.sum().item())
        x = x[:, :length] + self.table
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return {"x": x + self.router(x, self.scale), "text": text, "sizes": (x.shape[1], x.mean(1))}


def everything(scale=0.5, seed=0):
    torch.manual_seed(seed)
    return randomise(Everything(scale), seed).eval()


def call_of(length, total=12, seed=0):
    return {"x": torch.randn(1, total, WIDTH, generator=torch.Generator().manual_seed(seed)), "mask": torch.arange(total) < length}


def not_compiled(*args, **kwargs):
    raise AssertionError("a program was compiled")


@pytest.fixture(scope="module")
def flux():
    """(family, configuration, model, a call, compiled with symbolic sizes)"""
    family = registry.get("flux")
    config = family.tiny_config(4, 1)
    model = randomise(family.build(config))
    inputs = family.grid_inputs(config, rows=4, columns=4, text_len=8)
    started = time.process_time()
    compiled = seqpar.sp_compile(model, inputs)
    return family, config, model, inputs, compiled, time.process_time() - started


@pytest.fixture(scope="module")
def flux_file(flux, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "flux.seqpar"
    flux[4].save(path)
    return path


def test_symbolic_program_of_flux(flux, flux_file):
    family, config, model, inputs, compiled, seconds = flux
    other = family.build(config)
    other.load_state_dict({name: value * 1.25 for name, value in model.state_dict().items()})
    started = time.process_time()
    loaded = seqpar.load(flux_file, other)
    assert time.process_time() - started < seconds / 5
    loaded._builder.build = not_compiled
    resized = family.grid_inputs(config, rows=3, columns=5, text_len=7)
    with torch.no_grad():
        for call in (inputs, resized):
            assert torch.equal(loaded(**call)[0], other(**call)[0]) and not torch.equal(loaded(**call)[0], model(**call)[0])
    assert loaded.plan == compiled.plan and loaded.plan.attention and loaded._current.program.interface.sizes == compiled._current.program.interface.sizes
    assert all(a is b for a, b in zip(loaded.parameters(), other.parameters(), strict=True))
    with pytest.raises(AssertionError, match="was compiled"):
        loaded(**{**inputs, "hidden_states": inputs["hidden_states"].double()})


def test_plan_survives_json(flux):
    plan = flux[4].plan
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    with pytest.raises(ValueError, match="a Plan needs ulysses"):
        Plan.from_dict({key: value for key, value in plan.to_dict().items() if key != "ulysses"})


@pytest.fixture(scope="module")
def everything_file(tmp_path_factory):
    """A file with programs for two lengths that the model reads from its mask."""
    path = tmp_path_factory.mktemp("saved") / "everything.seqpar"
    model = everything()
    compiled = seqpar.sp_compile(model, call_of(7), dynamic=False)
    with torch.no_grad():
        compiled(**call_of(9))
    seqpar.save(compiled, path)
    return path


def agree(outputs, expected):
    return torch.allclose(outputs["x"], expected["x"], atol=1e-5) and outputs["text"] == expected["text"] and outputs["sizes"][0] == expected["sizes"][0]


def test_guards_constants_buffers_and_modules_that_run_as_they_are(everything_file):
    model, reference = everything(seed=1), everything(seed=1)
    loaded = seqpar.load(everything_file, model)
    build, loaded._builder.build = loaded._builder.build, not_compiled
    with torch.no_grad():
        for length, seed in ((7, 0), (9, 1), (7, 2)):
            assert agree(loaded(**call_of(length, seed=seed)), reference(**call_of(length, seed=seed)))
        assert model.calls == reference.calls == 3
        with pytest.raises(AssertionError, match="was compiled"):
            loaded(**call_of(5))
        loaded._builder.build = build
        assert agree(loaded(**call_of(5)), reference(**call_of(5)))


def timeless(plan):
    """A plan without the seconds that making it took on this rank."""
    return dataclasses.replace(plan, seconds={})


def page(plan):
    """What people see of a plan: the text without the seconds that making it took, and the picture."""
    return plan.explain().partition("\nseconds ")[0], plan.to_dot()


def test_loaded_programs_are_saved_again_beside_new_ones(everything_file, tmp_path):
    loaded = seqpar.load(everything_file, everything())
    with torch.no_grad():
        loaded(**call_of(5))
    loaded.save(tmp_path / "three.seqpar")
    model, reference = everything(seed=1), everything(seed=1)
    again = seqpar.load(tmp_path / "three.seqpar", model)
    again._builder.build = not_compiled
    with torch.no_grad():
        for length in (5, 7, 9):
            assert agree(again(**call_of(length)), reference(**call_of(length)))
    again.plan.to_html(tmp_path / "plan.html")
    assert "router" in (tmp_path / "plan.html").read_text()
    with pytest.raises(UnsupportedError, match="no graph to ask"):
        again.plan.why("qkv")


def on_ranks(path, ulysses, ring):
    model = everything()
    with torch.no_grad():
        compiled = seqpar.sp_compile(model, call_of(7), ulysses=ulysses, ring=ring, dynamic=False)
        compiled.save(path)
        dist.barrier()
        loaded = seqpar.load(path, model, ring=ring)
        loaded._builder.build = not_compiled
        expected, outputs = compiled(**call_of(7, seed=3)), loaded(**call_of(7, seed=3))
        loaded.save(f"{path}.again")
        dist.barrier()
        again = seqpar.load(f"{path}.again", model)
        again._builder.build = not_compiled
        assert torch.equal(again(**call_of(7, seed=3))["x"], expected["x"])
        assert page(again.plan) == page(loaded.plan) == page(compiled.plan) and "runner-up" in page(again.plan)[0]
        try:
            seqpar.load(path, model, ulysses=3)
        except MeshError as error:
            refused = str(error)
        return torch.equal(outputs["x"], expected["x"]) and agree(outputs, model(**call_of(7, seed=3))), loaded._current.program.split, timeless(loaded.plan) == timeless(compiled.plan), refused


def test_real_ranks(two_ranks, tmp_path):
    for right, split, same_plan, refused in two_ranks.run(on_ranks, str(tmp_path / "two.seqpar"), 1, 2):
        assert right and split and same_plan and "ulysses=1, not 3" in refused


def test_wrong_number_of_ranks_is_named(flux_file, flux, tmp_path):
    header = edited(flux_file, tmp_path / "four.seqpar", "seqpar.json", lambda data: {**data, "ulysses": 2, "ring": 2})
    with pytest.raises(MeshError, match="ulysses=2, ring=2 needs 4 processes"):
        seqpar.load(header, flux[2])


def edited(source, path, member, change):
    """A copy of a file with one JSON member changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, json.dumps(change(json.loads(data))) if name == member else data)
    return path


WRONG = {
    "versions": (lambda data: {**data, "versions": "seqpar=0.0.1 torch=1.0"}, "written by seqpar=0.0.1 torch=1.0, and this is seqpar=.* torch=2"),
    "format": (lambda data: {**data, "format": 99}, "format"),
    "device": (lambda data: {**data, "device": "cuda"}, "a model on cuda, and this one is on cpu"),
    "comm_dtype": (lambda data: {**data, "comm_dtype": {"dtype": "int8"}}, "damaged"),
    "backend": (lambda data: {**data, "backend": "os.system"}, "damaged"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_header(everything_file, tmp_path, what):
    change, message = WRONG[what]
    with pytest.raises(SavedProgramError, match=message):
        seqpar.load(edited(everything_file, tmp_path / "wrong", "seqpar.json", change), everything())


def test_another_model_is_named(everything_file):
    with pytest.raises(SavedProgramError, match=r"attribute scale is 0.25, and was 0.5"):
        seqpar.load(everything_file, everything(scale=0.25))
    wider = everything()
    wider.router.gate = nn.Linear(WIDTH, 3)
    with pytest.raises(SavedProgramError, match=r"parameter router.gate.weight is \(3, 16\) float32, and was \(2, 16\) float32"):
        seqpar.load(everything_file, wider)
    with pytest.raises(SavedProgramError, match="training is True"):
        seqpar.load(everything_file, everything().train())


def test_foreign_and_damaged_files(everything_file, tmp_path):
    path = tmp_path / "foreign"
    path.write_bytes(b"no zip")
    with pytest.raises(SavedProgramError, match="is no file of programs"):
        seqpar.load(path, everything())
    torch.save({"a": 1}, path)
    with pytest.raises(SavedProgramError, match="no member seqpar.json"):
        seqpar.load(path, everything())
    shutil.copy(everything_file, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(SavedProgramError, match="damaged"):
        seqpar.load(path, everything())


def first_call(data, **change):
    """A program whose first call is changed."""
    place = next(i for i, node in enumerate(data) if node["op"] == "call_function")
    return [{**node, **change} if i == place else node for i, node in enumerate(data)]


TAMPERED = {
    "a target of Python": (lambda data: first_call(data, target="os.system"), "calls 'os.system'"),
    "an operator that opens files": (lambda data: first_call(data, target="aten.from_file.default"), "calls 'aten.from_file.default'"),
    "an operator that writes": (lambda data: first_call(data, target="aten.add_.Tensor"), "calls 'aten.add_.Tensor'"),
    "an attribute of an operator": (lambda data: first_call(data, target="aten.__class__.mro"), "calls 'aten.__class__.mro'"),
    "code in a name": (lambda data: [{**data[0], "target": "x): import os; (y"}, *data[1:]], "which is no name of a value"),
    "code in a keyword": (lambda data: first_call(data, kwargs={"dict": [["a=print(1), b", 1]]}), "no node of a program"),
    "an attribute that is no state": (lambda data: [{**data[0], "op": "get_attr", "target": "forward.__globals__"}, *data[1:]], "reads forward.__globals__"),
    "a later node": (lambda data: first_call(data, args={"tuple": [{"node": len(data) - 1}]}), "it comes later"),
    "no outputs": (lambda data: data[:-1], "without its outputs"),
    "another value": (lambda data: first_call(data, args={"tuple": [{"object": "os"}]}), "no value of a program"),
    "a module elsewhere": (lambda data: first_call(data, target="runtime.run_opaque"), "in a way a program must not"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_tampered_programs_are_refused(everything_file, tmp_path, what):
    change, message = TAMPERED[what]
    with pytest.raises(SavedProgramError, match=message):
        seqpar.load(edited(everything_file, tmp_path / "tampered", "program0/rank0.json", change), everything())


class Box:
    def __init__(self):
        self.seen = torch.zeros(1)


class Assigns(nn.Module):
    def forward(self, x, box):
        box.seen = x.sum()
        return F.scaled_dot_product_attention(x, x, x)


class Scaled(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x) + torch.ops.saving_test.twice(x)


def test_what_a_file_cannot_hold_is_named(tmp_path):
    x = torch.randn(1, 2, 4, 8)
    compiled = seqpar.sp_compile(Assigns(), (x, Box()), dynamic=False)
    with pytest.raises(SavedProgramError, match="inputs hold a .*Box"):
        compiled.save(tmp_path / "state")
    library = torch.library.Library("saving_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    compiled = seqpar.sp_compile(Scaled(), (x,), dynamic=False)
    with pytest.raises(SavedProgramError, match=r"calls saving_test.twice.default .*test_saving.py"):
        compiled.save(tmp_path / "operator")
    assert not list(tmp_path.iterdir())
