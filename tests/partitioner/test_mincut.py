"""The minimum cut: optimal against brute force, ties say yes, forced answers hold."""

import itertools
import math
import random

import pytest

from seqpar.partitioner.mincut import CutProblem


def price(problem, answers):
    unary = sum(y if a else n for y, n, a in zip(problem.yes_cost, problem.no_cost, answers, strict=True))
    return unary + sum(w for (a, b), w in problem.edges.items() if answers[a] and not answers[b])


def brute_force(problem):
    return min(price(problem, answers) for answers in itertools.product((False, True), repeat=len(problem.yes_cost)))


def random_problem(rng):
    problem = CutProblem()
    for _ in range(rng.randint(1, 8)):
        kind = rng.random()
        problem.vertex(yes=math.inf if kind < 0.1 else rng.randint(0, 20), no=math.inf if kind > 0.9 else rng.randint(0, 20))
    n = len(problem.yes_cost)
    for _ in range(rng.randint(0, 14) if n > 1 else 0):
        a, b = rng.sample(range(n), 2)
        problem.edge(a, b, rng.choice([0, 1, 5, 9]))
    return problem


@pytest.mark.parametrize("seed", range(60))
def test_against_brute_force(seed):
    problem = random_problem(random.Random(seed))
    cost, answers = problem.solve()
    assert cost == pytest.approx(price(problem, answers)) == pytest.approx(brute_force(problem))


def test_ties_say_yes():
    problem = CutProblem()
    vertices = [problem.vertex(yes=3, no=3) for _ in range(3)]
    problem.edge(vertices[0], vertices[1], 2)
    assert problem.solve() == (9, [True] * 3)


def test_forced_answers_spread_along_infinite_edges():
    problem = CutProblem()
    whole = problem.vertex(yes=math.inf)
    a, b, free = problem.vertex(no=10), problem.vertex(no=10), problem.vertex(no=10)
    problem.edge(a, whole, math.inf)
    problem.tie(a, b)
    cost, answers = problem.solve()
    assert cost == 20 and answers == [False, False, False, True] and free == 3


def test_a_vertex_without_an_answer_is_an_error():
    problem = CutProblem()
    problem.vertex(yes=math.inf, no=math.inf)
    with pytest.raises(AssertionError, match="neither"):
        problem.solve()


def test_tiny_prices_beside_large_ones_count():
    problem = CutProblem()
    big, small = problem.vertex(yes=1e15, no=2e15), problem.vertex(yes=1.0, no=0.5)
    assert problem.solve()[1] == [True, False]
    assert (big, small) == (0, 1)


def test_no_vertices():
    assert CutProblem().solve() == (0.0, [])
