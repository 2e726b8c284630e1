"""The mutants fit the source, and one planted mistake is noticed."""

from collections import Counter
from dataclasses import replace

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


TEST = "tests/runtime/test_layout.py::test_parts"


@pytest.fixture
def two(monkeypatch):
    """A mistake that the test notices, and one that it does not."""
    parts = next(mutant for mutant in MUTANTS if mutant.name == "longer parts come last")
    seen = Mutant("wrong parts", parts.file, parts.old, parts.new, (TEST,))
    unseen = Mutant("unseen", "runtime/ring.py", "source, pending = (rank - step) % size, None", "source, pending = 0, None", (TEST,))
    monkeypatch.setattr(mutate, "MUTANTS", (seen, unseen))
    return seen, unseen


def test_mistakes_are_noticed_and_survivors_told_and_remembered(tmp_path, capsys, monkeypatch, two):
    arguments = ["--table", str(tmp_path / "mutants.md"), "--state", str(tmp_path / "state.jsonl"), "--jobs", "1"]
    assert mutate.main(arguments) == 1
    output = capsys.readouterr().out
    assert f"wrong parts: {TEST}" in output and "unseen: SURVIVES" in output and "1 of 2 noticed" in output
    assert "no test looks at it" in (tmp_path / "mutants.md").read_text()
    state = mutate.State(tmp_path / "state.jsonl")
    assert state.outcome(two[0]).noticed_by.startswith(TEST) and state.outcome(two[1]) is None and state.passed([TEST])
    monkeypatch.setattr(mutate, "examine", lambda mutant, timeout, server: mutate.Outcome(mutant, "again", 0.0))
    monkeypatch.setattr(mutate, "run_tests", None)  # nor is the check without mistakes repeated
    assert mutate.main(arguments) == 0
    output = capsys.readouterr().out
    assert f"wrong parts: {TEST}" in output and "unseen: again" in output


def test_a_state_that_was_cut_short_goes_on(tmp_path, two):
    path = tmp_path / "new" / "state.jsonl"
    state = mutate.State(path)
    for mutant in two:
        state.add(mutate.Outcome(mutant, "a test", 1.0))
    path.write_text(path.read_text()[:-5])
    state = mutate.State(path)
    assert state.outcome(two[0]).noticed_by == "a test" and state.outcome(two[1]) is None
    state.add(mutate.Outcome(two[1], "another", 1.0))
    assert [mutate.State(path).outcome(mutant).noticed_by for mutant in two] == ["a test", "another"]
    assert mutate.State(path).outcome(replace(two[0], tests=(TEST, TEST))) is None
    harmless = replace(two[0], harmless="nothing changes")
    state.add(mutate.Outcome(harmless, None, 1.0))
    assert mutate.State(path).outcome(harmless).fine and mutate.State(path).outcome(two[0]) is None  # the last word counts


def test_tests_that_do_not_run_are_told_after_the_others(monkeypatch, capsys, two):
    def examine(mutant, timeout, server):
        if mutant is two[0]:
            raise SeqparError("the tests did not run")
        return mutate.Outcome(mutant, "a test", 0.0)

    monkeypatch.setattr(mutate, "examine", examine)
    monkeypatch.setattr(mutate, "run_tests", lambda *_: None)
    assert mutate.main(["--jobs", "1"]) == 2
    output = capsys.readouterr()
    assert "unseen: a test" in output.out and "did not run" in output.err
