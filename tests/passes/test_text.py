"""Numbers and tables as text."""

from seqpar.passes.text import amount, capped, duration, percent, short, table


def test_numbers():
    assert [amount(n) for n in (0, 999, 1234, 5.6e9, 7e16, float("inf"))] == ["0 ", "999 ", "1.23 k", "5.6 G", "70 P", "∞ "]
    assert [duration(s) for s in (0, 2.5e-8, 3e-5, 0.0421, 75)] == ["0 s", "25 ns", "30 us", "42.1 ms", "75 s"]
    assert [percent(a, b) for a, b in ((1, 3), (-100, 100), (0.0017, 100), (1, 0))] == ["+33 %", "-100 %", "+0.0017 %", "+0 %"]


def test_tables_and_lists():
    assert table(("", "n", "why"), [("a", "10", "x"), ("long", "2", "")]) == ["         n  why", "  a     10  x", "  long   2"]
    assert capped(["a", "b", "c"], 2) == ["a", "  … 2 more"] and capped(["a", "b"], 2) == ["a", "b"]
    assert short("/x/site-packages/p/y.py:3") == "p/y.py:3" and short("/home/me/y.py:3") == "/home/me/y.py:3"
