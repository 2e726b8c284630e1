"""Which submodules are alike, and whether something that their code names has changed."""

import contextvars
import itertools

import pytest
import torch
from torch import nn

from seqpar.passes.repeated import SurroundingsWatch, alike

settings, variable, numbers, inner = {"scale": 1}, contextvars.ContextVar("variable", default=1), itertools.count(), {"level": [[]]}


def helper(kept=[]):  # noqa: B006
    return len(kept or "a") * settings["scale"] * variable.get()


class Block(nn.Module):
    factor = 1

    def __init__(self, width=4, **attributes):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(width, width) for _ in range(3))
        self.__dict__ |= attributes

    def forward(self, x):
        return self.c(self.b(self.a(x))) * helper() * self.factor * len(inner)


class Iterating(Block):
    def forward(self, x):
        return super().forward(x) * next(numbers)


def model(*blocks, container=nn.ModuleList):
    parent = nn.Module()
    parent.body, parent.head = container(blocks), nn.Linear(4, 4)
    return parent


def paths(module):
    return [block.path for block in alike(module)]


def test_blocks_of_a_list_are_alike():
    for container in (nn.ModuleList, lambda blocks: nn.Sequential(*blocks), lambda blocks: nn.ModuleDict({str(i): block for i, block in enumerate(blocks)})):
        assert paths(model(Block(), Block(), Block(), container=container)) == ["body.0", "body.1", "body.2"]
    assert paths(model(Block(), Block(), Block(), Block(8), nn.Linear(4, 4))) == ["body.0", "body.1", "body.2"]
    assert not paths(model(Block(), Block())) and not paths(model(*(nn.Linear(4, 4) for _ in range(9)))) and not paths(nn.Linear(4, 4))


@pytest.mark.parametrize("attribute", [1, "a", [1], {"a": 1}, torch.ones(2), (1, 2)])
def test_a_difference_in_state(attribute):
    same = [Block(value=attribute) for _ in range(3)]
    assert len(paths(model(*same))) == 3
    assert not paths(model(*same[:2], Block(value=attribute * 2 if not isinstance(attribute, dict) else {"a": 2})))
    other = Block(value=attribute).train(False)
    assert not paths(model(*same[:2], other))


def test_content_of_weights_is_no_difference_and_their_form_is():
    blocks = [Block() for _ in range(3)]
    for i, block in enumerate(blocks):
        nn.init.constant_(block.a.weight, i)
    assert len(paths(model(*blocks))) == 3
    blocks[2].a.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.float64))
    assert not paths(model(*blocks))


@pytest.mark.parametrize("value", [lambda x: x, (i for i in range(3)), object()])
def test_a_state_that_cannot_be_compared(value):
    """A generator has none that is seen. A function is compared by its code, unless it closes over something."""
    blocks = [Block(value=value) for _ in range(3)]
    assert len(paths(model(*blocks))) == (3 if callable(value) else 0)


def test_functions_with_a_state_of_their_own():
    seen = []
    closing = [Block(value=lambda x: seen.append(x)) for _ in range(3)]
    bound = [Block(value=seen.append) for _ in range(3)]
    own = [Block() for _ in range(3)]
    for block in own:
        block.value = block.a.forward
    assert not paths(model(*closing)) and not paths(model(*bound)) and len(paths(model(*own))) == 3


def test_the_outermost_are_taken_and_inner_ones_where_those_differ():
    def stage(**attributes):
        return model(Block(), Block(), Block()) if not attributes else Block(**attributes)

    assert paths(model(stage(), stage(), stage())) == ["body.0", "body.1", "body.2"]
    stages = [stage() for _ in range(3)]
    for i, each in enumerate(stages):
        each.number = i
    assert len(paths(model(*stages))) == 9


def test_modules_with_two_names_are_left_out():
    blocks = [Block() for _ in range(4)]
    blocks[3].a = blocks[2].a
    assert not paths(model(*blocks[1:])) and len(paths(model(*blocks, Block()))) == 3


def test_an_iterator_that_the_code_names():
    assert not paths(model(Iterating(), Iterating(), Iterating()))


def test_surroundings():
    """Variables, contents of containers, class attributes, contexts; by way of functions that the code calls."""
    surroundings = alike(model(Block(), Block(), Block()))[0].surroundings
    watch = SurroundingsWatch(surroundings)
    assert not watch.changed()
    settings["scale"] = 2
    assert watch.changed()
    settings["scale"] = 1
    assert not watch.changed()
    token = variable.set(2)
    assert watch.changed()
    variable.reset(token)
    Block.factor = 2
    assert watch.changed()
    Block.factor = 1
    helper.__defaults__[0].append(1)
    assert watch.changed()
    helper.__defaults__[0].clear()
    helper.calls = 1
    assert watch.changed()
    del helper.calls
    inner["level"][0].append(1)
    assert watch.changed()
    inner["level"][0].clear()
    assert not watch.changed()
