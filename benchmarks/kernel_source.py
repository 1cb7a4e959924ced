"""What a Triton kernel does with its arguments, read in its source: loads, stores and products."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Uses:
    """Which arguments a kernel loads from and stores to, and how many products it has."""

    reads: set[str]
    writes: set[str]
    products: int = 0


@functools.cache
def uses_of(function: Callable[..., Any], known: tuple[tuple[str, Any], ...]) -> Uses:
    """Return what a function of Triton's language does with its arguments.

    Args:
        function: The Python function.
        known: Arguments that are known when it is compiled: branches they rule out do not count.
    """
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(tree, ast.FunctionDef)
    reader = _Reader(function, dict(known))
    names = [argument.arg for argument in tree.args.args]
    reader.origins = {name: {name} for name in names}
    reader.block(tree.body)
    return reader.uses


class _Reader:
    """Follows from which arguments each variable of a kernel is made."""

    def __init__(self, function: Callable[..., Any], known: dict[str, Any]) -> None:
        self.globals = inspect.getclosurevars(function).globals
        self.known = known
        self.uses = Uses(set(), set())
        self.origins: dict[str, set[str]] = {}

    def block(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            if isinstance(statement, ast.If):
                taken = self._truth(statement.test)
                self.of(statement.test)
                if taken is not False:
                    self.block(statement.body)
                if taken is not True:
                    self.block(statement.orelse)
            elif isinstance(statement, ast.For | ast.While):
                if isinstance(statement, ast.For):
                    self.of(statement.iter)
                self.block(statement.body)
            elif isinstance(statement, ast.Assign | ast.AugAssign | ast.AnnAssign):
                origins = self.of(statement.value) if statement.value else set()
                targets = (
                    statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                )
                for target in targets:
                    for name in ast.walk(target):
                        if isinstance(name, ast.Name):
                            before = self.origins.get(name.id, set())
                            keeps = isinstance(statement, ast.AugAssign)
                            self.origins[name.id] = origins | (before if keeps else set())
            else:
                for value in ast.iter_child_nodes(statement):
                    self.of(value)

    def _truth(self, test: ast.expr) -> bool | None:
        """Return what a condition of known arguments is, else None."""
        try:
            return bool(eval(compile(ast.Expression(test), "", "eval"), {}, dict(self.known)))
        except (NameError, AttributeError, TypeError):
            return None

    def of(self, expression: ast.AST) -> set[str]:
        """Note the uses inside an expression, and return the arguments that it is made of."""
        if isinstance(expression, ast.Name):
            return self.origins.get(expression.id, set())
        if isinstance(expression, ast.Attribute) and expression.attr == "dtype":
            return set()
        if isinstance(expression, ast.Call):
            return self._call(expression)
        parts = [self.of(child) for child in ast.iter_child_nodes(expression)]
        return set().union(*parts)

    def _call(self, call: ast.Call) -> set[str]:
        arguments = [self.of(value) for value in call.args]
        named = {keyword.arg: self.of(keyword.value) for keyword in call.keywords}
        function = call.func
        if isinstance(function, ast.Attribute):
            of_language = isinstance(function.value, ast.Name) and function.value.id == "tl"
            target = arguments[0] if of_language and arguments else self.of(function.value)
            if function.attr == "dot" and of_language:
                self.uses.products += 1
            if function.attr == "load":
                self.uses.reads |= target
                return set()
            if function.attr == "store" or function.attr.startswith("atomic"):
                self.uses.writes |= target
                return set()
            if not of_language:
                arguments = [target, *arguments]
        elif isinstance(function, ast.Name):
            called = self.globals.get(function.id)
            called = getattr(called, "fn", getattr(called, "_function", None))
            if called is not None:
                return self._nested(getattr(called, "fn", called), call, arguments, named)
        return set().union(*arguments, *named.values())

    def _nested(
        self,
        function: Callable[..., Any],
        call: ast.Call,
        arguments: list[set[str]],
        named: dict[str | None, set[str]],
    ) -> set[str]:
        """Note what another function does with what it is given."""
        names = list(inspect.signature(function).parameters)
        values = dict(zip(names, call.args, strict=False))
        values |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        known = {
            name: self.known[value.id]
            for name, value in values.items()
            if isinstance(value, ast.Name) and value.id in self.known
        }
        uses = uses_of(function, tuple(sorted(known.items())))
        given = dict(zip(names, arguments, strict=False)) | {k: v for k, v in named.items() if k}
        self.uses.products += uses.products
        for name, origins in given.items():
            if name in uses.reads:
                self.uses.reads |= origins
            if name in uses.writes:
                self.uses.writes |= origins
        used = uses.reads | uses.writes
        return set().union(*(origins for name, origins in given.items() if name not in used))
