"""The one table of operator rules. Adding a rule = one function with `@rule(target, …)` in `partitioner/rules`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from seqpar.partitioner.op import Op

RuleFn = Callable[["Op"], None]


class RuleRegistry:
    """Maps ATen overloads, tags of operators and names of other libraries' operators to rules; a second rule for the same one is an error."""

    def __init__(self) -> None:
        self._rules: dict[Any, RuleFn] = {}
        self._by_tag: dict[torch.Tag, RuleFn] = {}
        self._by_name: dict[str, RuleFn] = {}

    def rule(self, *targets: Any) -> Callable[[RuleFn], RuleFn]:
        def register(fn: RuleFn) -> RuleFn:
            for target in targets:
                table: dict[Any, RuleFn] = self._by_tag if isinstance(target, torch.Tag) else self._by_name if isinstance(target, str) else self._rules
                if target in table:
                    raise ValueError(f"{target} already has a rule: {table[target].__module__}.{table[target].__name__}")
                table[target] = fn
            return fn

        return register

    def find(self, target: Any) -> RuleFn | None:
        found = self._rules.get(target) or self._by_name.get(getattr(target, "_name", ""))
        if found is None:
            for tag in getattr(target, "tags", ()):
                if tag in self._by_tag:
                    return self._by_tag[tag]
        return found

    def targets(self) -> list[Any]:
        return list(self._rules)


registry = RuleRegistry()
rule = registry.rule
