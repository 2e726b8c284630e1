"""The mutants fit the source, and one planted mistake is noticed."""

from collections import Counter

import pytest

from seqpar.errors import SeqparError
from seqpar.tools import mutate
from seqpar.tools.mutants import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_can_be_planted(mutant, tmp_path):
    source = (mutate.ROOT / mutant.file).read_text()
    copy = tmp_path / mutant.file
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(source)
    mutate.plant(mutant, tmp_path)
    compile(copy.read_text(), mutant.file, "exec")
    assert copy.read_text() != source
    assert all((mutate.ROOT / test.partition("::")[0]).exists() for test in mutant.tests if not test.startswith(mutate.RULES))


def test_there_are_many_and_they_have_names():
    assert len(MUTANTS) >= 36 and max(Counter(mutant.name for mutant in MUTANTS).values()) == 1
    assert sum(bool(mutant.harmless) for mutant in MUTANTS) <= 0.05 * len(MUTANTS)


def test_a_text_that_is_gone_is_an_error(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(SeqparError, match="0 times 'y = 1'"):
        mutate.plant(Mutant("m", "a.py", "y = 1", "y = 2", ()), tmp_path)


def test_mistakes_are_noticed_and_survivors_told(tmp_path, capsys, monkeypatch):
    test = "tests/runtime/test_layout.py::test_parts"
    parts = next(mutant for mutant in MUTANTS if mutant.name == "longer parts come last")
    seen = Mutant("wrong parts", parts.file, parts.old, parts.new, (test,))
    unseen = Mutant("unseen", "runtime/ring.py", "source, pending = (rank - step) % size, None", "source, pending = 0, None", (test,))
    monkeypatch.setattr(mutate, "MUTANTS", (seen, unseen))
    assert mutate.main(["--table", str(tmp_path / "mutants.md")]) == 1
    output = capsys.readouterr().out
    assert "wrong parts: tests/runtime/test_layout.py::test_parts" in output and "unseen: SURVIVES" in output and "1 of 2 noticed" in output
    assert "no test looks at it" in (tmp_path / "mutants.md").read_text()
