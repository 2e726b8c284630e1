"""From a name on the command line to a model and its inputs."""

import argparse
import json

import pytest
import torch
from diffusers import FluxTransformer2DModel

from seqpar.errors import SeqparError
from seqpar.models import registry
from seqpar.tools.cli import models


def resolve(*arguments, device="meta"):
    parser = argparse.ArgumentParser()
    models.add_arguments(parser)
    return models.resolve(parser.parse_args([str(argument) for argument in arguments]), device=device)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline folder with configurations and no weights."""
    root = tmp_path_factory.mktemp("checkpoint")
    with torch.device("meta"):
        FluxTransformer2DModel(**registry.get("flux").tiny_config(heads=3, layers=1)).save_config(root / "transformer")
    (root / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"], "vae": []}))
    return root


def test_a_registered_family_tiny_and_full():
    tiny = resolve("tiny:qwen-image", "--height", 64, "--width", 96, "--text-len", 5, "--batch", 2)
    assert next(tiny.model.parameters()).device.type == "meta" and not tiny.model.training
    assert tiny.inputs["hidden_states"].shape == (2, 24, 16) and tiny.inputs["encoder_hidden_states"].shape[1] == 5
    full = resolve("full:wan", "--frames", 9, "--dtype", "bfloat16")
    assert full.inputs["hidden_states"].shape == (1, 16, 3, 90, 160), "the published size where nothing else is said"
    assert full.inputs["hidden_states"].dtype == torch.bfloat16 and sum(p.numel() for p in full.model.parameters()) > 1e10


@pytest.mark.parametrize("part", ["", "transformer"])
def test_a_checkpoint_folder_without_weights(folder, part):
    named = resolve(folder / part, "--height", 32, "--width", 32)
    assert isinstance(named.model, FluxTransformer2DModel) and named.model.config.num_attention_heads == 3
    assert next(named.model.parameters()).device.type == "meta" and named.inputs["hidden_states"].shape == (1, 4, 16)
    assert "FluxTransformer2DModel" in named.title


def test_random_weights_where_they_are_needed(folder):
    model = resolve(folder, "--height", 32, "--width", 32, device="cpu").model
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert all(p.detach().unique().numel() > 1 for p in model.parameters() if p.numel() > 8), "no layer of zeros"


CODE = """
import torch
class Net(torch.nn.Module):
    def __init__(self, width, depth=1):
        super().__init__()
        self.layer = torch.nn.Linear(width, width * depth)
    def forward(self, x):
        return self.layer(x)
class Other:
    pass
"""


def test_a_class_of_a_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["elsewhere"] + __import__("sys").path)
    (tmp_path / "named_nets.py").write_text(CODE)
    (tmp_path / "net.json").write_text('{"width": 4, "_class_name": "Net"}')
    (tmp_path / "inputs.json").write_text('{"x": {"shape": [2, 4]}}')
    named = resolve("named_nets:Net", "--config", "net.json", "--inputs", "inputs.json")
    assert named.model.layer.weight.shape == (4, 4) and named.inputs["x"].device.type == "meta"
    with pytest.raises(SeqparError, match="nothing says what the inputs.*--inputs FILE"):
        resolve("named_nets:Net", "--config", "net.json")
    with pytest.raises(SeqparError, match="width.*--config FILE"):
        resolve("named_nets:Net")
    with pytest.raises(SeqparError, match="no torch.nn.Module"):
        resolve("named_nets:Other")
    with pytest.raises(SeqparError, match="cannot import Missing"):
        resolve("named_nets:Missing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flux"], "no model 'flux': give tiny:NAME"),
        (["tiny:nonsense"], "no model family 'nonsense'"),
        (["tiny:flux", "--height", "60"], "multiples of 16"),
        (["tiny:flux", "--inputs-of", "nonsense"], "no model family"),
    ],
)
def test_wrong_names(arguments, message):
    with pytest.raises(SeqparError, match=message):
        resolve(*arguments)


def test_wrong_folders(folder, tmp_path):
    with pytest.raises(SeqparError, match="neither config.json nor model_index.json"):
        resolve(tmp_path)
    with pytest.raises(SeqparError, match="no vae/config.json: choose one of transformer"):
        resolve(folder, "--component", "vae")
    (tmp_path / "config.json").write_text('{"_class_name": "NoSuchModel"}')
    with pytest.raises(SeqparError, match="NoSuchModel"):
        resolve(tmp_path)
