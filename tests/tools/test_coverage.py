"""The coverage run: every class has a case, and failures of every kind are recorded instead of ending the run."""

import importlib
import inspect
import json
import os
import pkgutil
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from seqpar.tools import coverage, coverage_backend
from seqpar.tools.coverage_cases import all_cases
from seqpar.tools.coverage_cases.case import Case, Draw
from seqpar.tools.coverage_table import state, summary_line, table


class OneAttention(nn.Module):
    def forward(self, x_BHSD: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x_BHSD, x_BHSD + 1, x_BHSD - 1)


class Hangs(OneAttention):
    def forward(self, x_BHSD: torch.Tensor) -> torch.Tensor:
        time.sleep(60)
        return x_BHSD


class Dies(OneAttention):
    def forward(self, x_BHSD: torch.Tensor) -> torch.Tensor:
        os._exit(3)


class Raises(OneAttention):
    def forward(self, x_BHSD: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such thing")


def case(model: type[nn.Module]) -> Case:
    return Case(model.__name__, model, lambda d: {"x_BHSD": d.normal(d.batch, 4, d.tokens, 8)})


# Classes that need no case, and why.
EXCLUDED = {
    "ControlNetXSAdapter": "cannot be called: it holds weights for UNetControlNetXSModel, which has a case",
}


def model_classes() -> set[str]:
    """Every model class defined in a file of diffusers' packages of transformers and ControlNets."""
    from diffusers.models import controlnets, transformers
    from diffusers.models.modeling_utils import ModelMixin

    found = set()
    for package in (transformers, controlnets):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            found |= {name for name, value in vars(module).items() if inspect.isclass(value) and issubclass(value, ModelMixin) and value.__module__ == info.name}
    return found


def test_every_diffusers_transformer_and_control_net_has_a_case() -> None:
    classes, cases = model_classes(), {c.class_name for c in all_cases()}
    assert len(classes) > 90
    missing = classes - cases - EXCLUDED.keys()
    assert not missing, f"classes without a coverage case: {sorted(missing)}"
    assert not EXCLUDED.keys() & cases and EXCLUDED.keys() <= classes


def test_draws_are_reproducible_and_odd_lengths_are_odd() -> None:
    assert torch.equal(Draw("odd").normal(3), Draw("odd").normal(3))
    odd = Draw("odd")
    assert odd.tokens % 2 and odd.frames * odd.video_rows * odd.video_cols % 2 and odd.text % 2
    assert Draw("large").tokens >= 1024
    with pytest.raises(ValueError, match="variant"):
        Draw("medium")


def test_an_attention_is_measured_on_all_meshes(tmp_path: Path) -> None:
    result = coverage.run_apart(case(OneAttention), ["even", "large"], tmp_path / "r.json", 60, backend=True)
    assert state(result) == "ok", summary_line(result)
    even = result["variants"]["even"]["meshes"]
    assert set(even) == set(coverage.MESHES)
    assert even["u2"]["rel_err"] < 1e-6 and even["u2"]["fraction"] > 0.9 and even["u2"]["comm_bytes"] > 0
    assert "rel_err" not in result["variants"]["large"]["meshes"]["u2r2"]
    compiled = result["variants"]["even"]["backend"]
    assert compiled["ok"] and compiled["graphs"] == compiled["split"] == 1, compiled
    text = table([result])
    assert "| OneAttention | ok | plain |" in text and "ok, 1 of 1 graphs split" in text and "**OneAttention**" not in text
    assert json.loads((tmp_path / "r.json").read_text()) == result


@pytest.mark.parametrize(("model", "timeout", "expected"), [(Hangs, 2, "no answer"), (Dies, 60, "ended with 3"), (Raises, 60, "no such thing")])
def test_failures_are_recorded(model: type[nn.Module], timeout: float, expected: str, tmp_path: Path) -> None:
    result = coverage.run_apart(case(model), ["even"], tmp_path / "r.json", timeout)
    assert state(result) == "UNTRACED"
    assert expected in summary_line(result)
    assert model.__name__ in table([result])


class Routed(OneAttention):
    """Its expert is chosen by an activation, in a module of its own."""

    class Pick(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.experts[int(self.experts[0](x).mean() > 0)](x)

    def __init__(self) -> None:
        super().__init__()
        self.pick = self.Pick()

    def forward(self, x_BHSD: torch.Tensor) -> torch.Tensor:
        return self.pick(super().forward(x_BHSD))


def test_what_is_not_fully_sharded_has_its_reason_in_the_table() -> None:
    result = {"case": "Routed", "variants": {"even": coverage.measure_variant(case(Routed), "even", backend=False)}}
    text = table([result])
    assert state(result) == "ok" and "1 opaque modules" in text
    assert "**Routed**" in text and "pick (Routed.Pick): routes by activations" in text


def test_bytes_of_the_plan_in_diffusers_are_counted() -> None:
    flux = next(c for c in all_cases() if c.name == "FluxTransformer2DModel")
    assert coverage_backend.has_plan(flux) and not coverage_backend.has_plan(case(OneAttention))
    found = coverage_backend.measure_peer(flux, "even", {"u2": (2, 1), "u2r2": (2, 2)})
    assert found["u2"]["bytes"] > 0, found


def test_finished_cases_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(coverage, "all_cases", lambda: (case(OneAttention),))
    arguments = ["--work", str(tmp_path / "work"), "--variants", "even", "--table", str(tmp_path / "models.md"), "--json", str(tmp_path / "all.json")]
    assert coverage.main(arguments) == 0
    assert coverage.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "(known)" in lines[1] and "(known)" not in lines[0]
    assert "OneAttention" in (tmp_path / "models.md").read_text()
    assert len(json.loads((tmp_path / "all.json").read_text())) == 1
