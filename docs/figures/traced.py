"""Formulas as data: a function of numbers is run on symbols, and what it does to them is written down as a tree of plain lists.

A tree is a number, the name of a variable, or `[operation, …]` with trees: `+ - * // / ceil min max < <= ==`, and
`["?", condition, tree if it holds, tree if not]` for each branch that depends on a symbol.
"""

import builtins
import math
import operator
from collections.abc import Callable
from typing import Any, ClassVar
from unittest.mock import patch

Tree = int | str | list[Any]
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv, "/": operator.truediv,
    "<": operator.lt, "<=": operator.le, "==": operator.eq, "min": min, "max": max, "ceil": math.ceil,
}  # fmt: skip


class Symbol:
    """A number that is not known: a variable, or what a function made of variables."""

    def __init__(self, tree: Tree):
        self.tree = tree

    def __add__(self, other: Any) -> Any:
        return self if isinstance(other, int) and other == 0 else _joined("+", self, other)

    def __mul__(self, other: Any) -> Any:
        return self if isinstance(other, int) and other == 1 else _joined("*", self, other)

    __radd__ = __add__
    __rmul__ = __mul__
    __hash__ = object.__hash__

    def __sub__(self, other: Any) -> Any:
        return _joined("-", self, other)

    def __rsub__(self, other: Any) -> Any:
        return _joined("-", other, self)

    def __neg__(self) -> Any:
        return _joined("-", 0, self)

    def __floordiv__(self, other: Any) -> Any:
        return _joined("//", self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return _joined("//", other, self)

    def __truediv__(self, other: Any) -> Any:
        return _joined("/", self, other)

    def __ceil__(self) -> "Symbol":
        return Symbol(["ceil", self.tree])

    def __lt__(self, other: Any) -> Any:
        return _Condition("<", self, other)

    def __le__(self, other: Any) -> Any:
        return _Condition("<=", self, other)

    def __eq__(self, other: Any) -> Any:
        return _Condition("==", self, other)


def _tree(value: Any) -> Tree:
    if not isinstance(value, Symbol | int):
        raise TypeError(f"expected a number or a symbol in a traced formula, got {value!r}")
    return value.tree if isinstance(value, Symbol) else value


def _joined(operation: str, left: Any, right: Any) -> Symbol:
    return Symbol([operation, _tree(left), _tree(right)])


class _Condition:
    """A comparison of symbols; whoever asks whether it holds is answered once so, and in another run otherwise."""

    asked: ClassVar[list[tuple[Tree, bool]]] = []  # on the way of the present run
    answers: ClassVar[list[bool]] = []

    def __init__(self, operation: str, left: Any, right: Any):
        self.tree = [operation, _tree(left), _tree(right)]

    def __bool__(self) -> bool:
        for tree, answer in self.asked:
            if tree == self.tree:
                return answer
        position = len(self.asked)
        answer = self.answers[position] if position < len(self.answers) else True
        self.asked.append((self.tree, answer))
        return answer


def traced(function: Callable[..., Any], *names: str) -> Tree:
    """The formula of what a function returns for variables of these names, all its branches in it."""
    return _explored(lambda: function(*map(Symbol, names)), [])


def _explored(run: Callable[[], Any], answers: list[bool]) -> Tree:
    _Condition.asked, _Condition.answers = [], answers
    with patch.multiple(builtins, min=_chosen("min"), max=_chosen("max")):
        tree = _tree(run())
    asked = _Condition.asked
    if len(asked) == len(answers):
        return tree
    condition = asked[len(answers)][0]
    then, otherwise = (_explored(run, [*answers, answer]) for answer in (True, False))
    return then if then == otherwise else ["?", condition, then, otherwise]


def _chosen(name: str) -> Callable[..., Any]:
    """The builtin `min` or `max`, which makes a formula where a symbol is among what it gets."""
    builtin = getattr(builtins, name)

    def choose(*values: Any, **options: Any) -> Any:
        if not any(isinstance(value, Symbol) for value in values):
            return builtin(*values, **options)
        return Symbol([name, *map(_tree, values)])

    return choose


def evaluated(tree: Tree, **variables: int) -> Any:
    """The value of a formula, as whoever reads it computes it."""
    if isinstance(tree, int):
        return tree
    if isinstance(tree, str):
        return variables[tree]
    operation, *parts = tree
    if operation == "?":
        return evaluated(parts[1] if evaluated(parts[0], **variables) else parts[2], **variables)
    values = [evaluated(part, **variables) for part in parts]
    return _OPERATIONS[operation](*values)
