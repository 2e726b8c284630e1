"""Programs kept between starts: the second start does not trace, and nothing that decides a program can change unnoticed."""

import logging
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

import seqpar
from seqpar import cache, compile

WIDTH = 16


class Block(nn.Module):
    """Attention over a length that its mask tells, with a table made in the first run."""

    def __init__(self, scale=0.5):
        super().__init__()
        self.qkv, self.scale, self.table = nn.Linear(WIDTH, 3 * WIDTH), scale, None
        self.names, self._words = {"a", "b", "c"}, list({"x", "y", "z"})

    def forward(self, x, mask):
        if self.table is None:
            self.table = torch.linspace(0, 1, WIDTH)
        x = x[:, : int(mask.sum())] + self.table
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return x + self.scale * nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def model(seed=0, **kwargs):
    torch.manual_seed(seed)
    return Block(**kwargs).eval()


def call(length=12):
    return {"x": torch.randn(1, 16, WIDTH, generator=torch.Generator().manual_seed(1)), "mask": torch.arange(16) < length}


def traced_of(block, folder, inputs=None, **kwargs):
    """(was it traced, the compiled module), compared with the model."""
    traces = []

    def noted(*args):
        traces.append(args)
        return original(*args)

    original, compile.traced_with = compile.traced_with, noted
    inputs = inputs or call()
    try:
        with seqpar.config(cache_dir=folder), torch.no_grad():
            fast = seqpar.sp_compile(block, inputs, dynamic=False, **kwargs)
            out = fast(**inputs)
    finally:
        compile.traced_with = original
    with torch.no_grad():
        torch.testing.assert_close(out, block(**inputs))
    return bool(traces), fast


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder with the program of `model()`."""
    folder = tmp_path_factory.mktemp("cache")
    traced, _ = traced_of(model(), folder)
    assert traced and len(list(folder.iterdir())) == 1
    return folder


def test_the_second_start_does_not_trace(filled, caplog):
    with caplog.at_level(logging.INFO, logger="seqpar.cache"):
        traced, fast = traced_of(model(), filled)
    assert not traced and "was read from" in caplog.text
    assert "attention" in fast.explain()
    with torch.no_grad():
        torch.testing.assert_close(fast(**call(9)), model()(**call(9)))  # another program is made as usual


def test_off_unless_set(filled, monkeypatch):
    monkeypatch.delenv("SEQPAR_CACHE_DIR", raising=False)
    assert traced_of(model(), None)[0]


def test_values_read_have_files_of_their_own(filled):
    before = len(list(filled.iterdir()))
    assert [traced_of(model(), filled, call(length))[0] for length in (7, 7, 12)] == [True, False, False]
    assert len(list(filled.iterdir())) == before + 1


def other_forward(self, x, mask):
    return Block.forward(self, x, mask) * 1


def hooked(block):
    block.qkv.register_forward_hook(lambda module, args, output: output * 2)
    return block


def patched(block):
    block.forward = other_forward.__get__(block)
    return block


CHANGES = {
    "attribute": lambda: model(scale=0.25),
    "weights (of which a table may be made)": lambda: model(seed=1),
    "hook": lambda: hooked(model()),
    "method of one object": lambda: patched(model()),
    "training": lambda: model().train(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_model_misses(what, filled):
    assert traced_of(CHANGES[what](), filled)[0]


def test_another_version_or_setting_misses(filled, monkeypatch):
    def key(**settings):
        block, inputs = model(), call()
        example = compile.canonical_call(compile.inspect.signature(block.forward), (), inputs)
        return cache.key_of(compile.Compiler(block, compile.Settings(**{"dynamic": False, **settings})), example, False)

    first = key()
    assert first == key() and first in {path.name.partition("-")[0] for path in filled.iterdir()}
    others = [key(ulysses=2), key(ring=2), key(backend="aot_eager"), key(plan=())]
    monkeypatch.setattr(torch, "__version__", "2.12.0")
    others.append(key())
    monkeypatch.undo()
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", other_forward)
    others.append(key())
    monkeypatch.undo()
    monkeypatch.setattr(cache, "own_code", lambda: "another seqpar")
    others.append(key())
    assert len({first, *others}) == len(others) + 1


@pytest.mark.parametrize("damage", [b"", b"no zip", None])
def test_a_damaged_file_is_passed_over(damage, filled, tmp_path, caplog):
    path = min(filled.iterdir(), key=lambda path: path.stat().st_mtime)  # that of `model()`
    data = path.read_bytes()
    (tmp_path / path.name).write_bytes(data[: len(data) // 2] if damage is None else damage)
    with caplog.at_level(logging.WARNING, logger="seqpar.cache"):
        assert traced_of(model(), tmp_path)[0]
    assert "is passed over" in caplog.text and "cannot" not in caplog.text
    assert not traced_of(model(), tmp_path)[0], "it was written anew"
    assert [found.suffix for found in tmp_path.iterdir()] == [".seqpar"]


def test_what_cannot_be_told_apart_is_compiled_without(tmp_path, caplog):
    block = model()
    block.stream = torch.Generator()
    with caplog.at_level(logging.INFO, logger="seqpar.cache"):
        assert traced_of(block, tmp_path)[0]
    assert "Block.stream is a torch._C.Generator" in caplog.text and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert traced_of(model(), tmp_path / "file" / "folder")[0]
    assert "cannot be kept" in caplog.text


def on_ranks(folder, empty_on):
    own = f"{folder}/none{dist.get_rank()}" if dist.get_rank() == empty_on else folder
    traced, fast = traced_of(model(), own, ulysses=2)
    return traced, fast._current.program.split


def test_real_ranks(two_ranks, tmp_path):
    """All ranks read, or all trace; ranks that look into different folders neither hang nor mix."""
    assert two_ranks.run(on_ranks, str(tmp_path), None) == [(True, True)] * 2
    assert two_ranks.run(on_ranks, str(tmp_path), None) == [(False, True)] * 2
    assert two_ranks.run(on_ranks, str(tmp_path), 1) == [(True, True)] * 2


SCRIPT = """
import importlib.util, sys, torch, seqpar, seqpar.compile
spec = importlib.util.spec_from_file_location("test_cache", {file!r})
test = importlib.util.module_from_spec(spec)
sys.modules["test_cache"] = test
spec.loader.exec_module(test)
for _ in range(2):
    print(test.traced_of(test.model(), {folder!r})[0])
"""


def test_another_process(tmp_path):
    """Words and numbers of a set come in another order there."""
    script = SCRIPT.format(file=__file__, folder=str(tmp_path))
    outcomes = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": seed}) for seed in ("1", "2")  # noqa: S603
    ]
    assert [run.stdout.split() for run in outcomes] == [["True", "False"], ["False", "False"]], outcomes
