"""Finds the functions behind an attribute of a class, the names in them and their syntax, alike on every Python.

The syntax is that of the source which a function was compiled from: it is compiled again, and compared. Of a function that
has no source, or whose file has changed since, there is none.
"""

import __future__

import ast
import contextlib
import dis
import functools
import inspect
import linecache
import re
import tokenize
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from leanvocab.reads.caches import emptied_with_models

Syntax = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
# Where the kinds of attribute that run a function keep it.
_HOLDERS: dict[type, str] = {
    property: "fget", functools.cached_property: "func", functools.partial: "func", functools.partialmethod: "func",
    staticmethod: "__func__", classmethod: "__func__", types.MethodType: "__func__",
}  # fmt: skip
_FUTURE = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)
_OF_CALLS = ("CALL", "PRECALL", "PUSH_NULL", "KW_NAMES", "CACHE", "EXTENDED_ARG", "NOP")


def functions_in(value: Any) -> Iterator[types.FunctionType]:
    """The functions that an attribute runs: its own, a property's, a partial's, and what decorators were put around."""
    waiting, passed = [value], set[int]()
    while waiting:
        inner = waiting.pop()
        if id(inner) in passed or isinstance(inner, type):
            continue
        passed.add(id(inner))
        waiting += [getattr(inner, name) for kind, name in _HOLDERS.items() if isinstance(inner, kind)]
        kept = list(attributes_of(inner).values())
        if isinstance(inner, types.FunctionType):
            yield inner
            kept += captured(inner).values()
        waiting += [each for each in kept if isinstance(each, types.FunctionType | types.MethodType)]


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes that an object itself keeps, by their names."""
    kept = getattr(value, "__dict__", None)
    return kept if isinstance(kept, dict) else {}


def captured(function: types.FunctionType) -> dict[str, Any]:
    """The variables around a function that it uses, by their names."""
    found: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # it is not assigned yet
            found[name] = cell.cell_contents
    return found


def is_compiled(value: Any) -> bool:
    """True for a method that no Python code stands behind, as Cython writes them: what it reads cannot be told."""
    return inspect.ismethoddescriptor(value) and not isinstance(value, tuple(_HOLDERS)) and not any(functions_in(value))


def once_a_code(find: Callable[[types.FunctionType], Any]) -> Callable[[types.FunctionType], Any]:
    """Keeps what was found in a function for as long as there are its code and a shrunk model."""
    known: weakref.WeakKeyDictionary[types.CodeType, Any] = emptied_with_models(weakref.WeakKeyDictionary())

    @functools.wraps(find)
    def find_once(function: types.FunctionType) -> Any:
        code = function.__code__
        if code not in known:
            known[code] = find(function)
        return known[code]

    return find_once


@once_a_code
def names_of(function: types.FunctionType) -> frozenset[str]:
    """The names in a function and in those inside it, those in strings too: what it does not name it hardly reads."""
    return _names_in(function.__code__)


def _names_in(code: types.CodeType) -> frozenset[str]:
    inside = [_names_in(each) for each in code.co_consts if isinstance(each, types.CodeType)]
    strings = [each.split(".") for each in code.co_consts if isinstance(each, str) and re.fullmatch(r"[\w.]+", each)]
    return frozenset(code.co_names + code.co_freevars).union(*inside, *strings)


def syntax_of(function: types.FunctionType) -> Syntax | None:
    """The syntax that a function was compiled from, None where there is no source, or another one by now."""
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)[code.co_firstlineno - 1 :]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said when the module was compiled
            text = "".join(inspect.getblock(lines))
            tree = ast.parse(f"if True:\n{text}" if text[:1].isspace() else text)
            syntaxes = (node for node in ast.walk(tree) if isinstance(node, Syntax))
            return next((node for node in syntaxes if _is_source_of(code, node)), None)
    except (SyntaxError, ValueError, tokenize.TokenError):
        return None


def _is_source_of(code: types.CodeType, syntax: Syntax) -> bool:
    if getattr(syntax, "name", "<lambda>") != code.co_name:
        return False
    # Names that begin with __ hold the name of their class, which is a global one unless it is around the function.
    owner = "".join(filter(str.isidentifier, code.co_qualname.split(".")[-2:-1])) or "_"
    free = [name for name in code.co_freevars if name != "__class__"]
    known = f"global {owner}" if owner not in free else "pass"
    around = ast.parse(f"def around():\n {known}\n {' = '.join([*free, 'None'])}\n class {owner}: pass")
    if not isinstance(syntax, ast.Lambda):
        syntax.decorator_list = []
    inside = around.body[0].body[2]  # type: ignore[attr-defined]
    inside.body = [ast.Expr(syntax) if isinstance(syntax, ast.Lambda) else syntax]
    flags = code.co_flags & _FUTURE
    module = compile(ast.fix_missing_locations(around), code.co_filename, "exec", flags, dont_inherit=True)
    return any(_steps(code) == _steps(each) for each in _codes_in(module) if each.co_name == code.co_name)


def _codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            yield from _codes_in(each)


def _steps(code: types.CodeType) -> list[tuple[str, Any]]:
    """The steps of a function with their names and constants; how calls are made depends on the imports of its module."""
    jumps = {*dis.hasjrel, *dis.hasjabs}
    return [
        (
            "LOAD" if step.opname.startswith("LOAD") else step.opname,
            _steps(step.argval)
            if isinstance(step.argval, types.CodeType)
            else step.opcode not in jumps and step.argval,
        )
        for step in dis.get_instructions(code)
        if not step.opname.startswith(_OF_CALLS)
    ]
