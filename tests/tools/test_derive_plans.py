"""Derived plans on real ranks through diffusers' own hooks, and the table that says so."""

import dataclasses
import json

import pytest

from seqpar.errors import SeqparError
from seqpar.tools import derive_plans
from seqpar.tools.coverage_cases import all_cases
from seqpar.tools.derive_plans import Row, check_on_rank, decode, derive_case, encode, entries, table

CASES = {case.name: case for case in all_cases()}
# Two streams with one plan for both, and one stream that is joined inline and entered at its first block.
CLASSES = ("LongCatImageTransformer2DModel", "ZImageTransformer2DModel")


@pytest.fixture(scope="module")
def rows():
    return [derive_case(CASES[name], 2, 1) for name in CLASSES]


def check(rows, path):
    check_on_rank(rows, 2, 1, path)


def test_plans_reproduce_the_model_on_two_ranks(rows, two_ranks, tmp_path):
    path = tmp_path / "checked.json"
    two_ranks.run(check, rows, str(path))
    checked = [Row(**row) for row in json.loads(path.read_text())]
    assert [row.case for row in checked] == list(CLASSES)
    for row in checked:
        assert row.good and row.error < 1e-5 and row.received > 0 and not row.own, row


def test_plans_travel_as_json(rows):
    for row in rows:
        plan = decode(json.loads(json.dumps(row.plan)))
        assert encode(plan) == row.plan and Row(**json.loads(json.dumps(dataclasses.asdict(row)))).plan == row.plan
    assert entries(decode(rows[1].plan)).startswith("`layers.*(freqs_cis)` `layers.0(x)` → `")


def test_the_table_has_plans_and_reasons(rows):
    text = table([dataclasses.replace(rows[0], error=2e-7, received=4096), Row("Other", reason="no cp_plan for Other on 2 ranks: inline cat at a|b"), Row("Lone", reason="attention of 4 queries at f.py:1 does not exchange over the ranks: …")])
    assert "| LongCatImageTransformer2DModel | `model(" in text and "2e-07 | 4096" in text
    assert "| Other | inline cat at a\\|b |" in text
    assert "whatever the plan: Lone." in text and "| Lone" not in text
    assert text.endswith("1 plans reproduce the model, 1 of them of classes that ship none.\n")


def test_the_command_derives_and_resumes(tmp_path, capsys, monkeypatch):
    (tmp_path / f"{CLASSES[0]}.json").write_text(json.dumps(dataclasses.asdict(Row(CLASSES[0], reason="no cp_plan for it on 2 ranks: known"))))
    monkeypatch.setattr(derive_plans, "derive_case", lambda *_: pytest.fail("a known case is derived again"))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{derive_plans.BEGIN}\nold\n{derive_plans.END}\nafter\n")
    assert derive_plans.main(["--work", str(tmp_path), "--only", CLASSES[0], "--no-ranks", "--docs", str(page)]) == 0
    assert "no plan: known" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "| known |" in text and "old" not in text
    with pytest.raises(SeqparError, match="no place for the table"):
        derive_plans.inserted("empty", "table")
