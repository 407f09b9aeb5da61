"""Finds the code of a model that reads a vocabulary matrix itself, around the module that holds it, without running it.

Follows the attributes in the source of the methods of the modules above the matrix, so that what counts is which module is
meant, not what it is called. A method without source, as in a session at the prompt, may read whatever it could reach. What
only running tells is left to the guard, which sees it in the first forward (docs/decisions/watching-the-first-forward.md).
"""

import builtins
import inspect
import re
import types
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from leanvocab.reads.function_source import (
    attributes_of,
    captured,
    functions_in,
    is_compiled,
    names_of,
    once_a_code,
    syntax_of,
)
from leanvocab.reads.weight_uses import ANY, Use, uses_in

if TYPE_CHECKING:
    from torch import nn

# Not a part of computing: building, tying, resizing, saving.
_ASIDE = re.compile(
    r"__(?!call__)\w+__|_?(init|tie|resize|reset|load|save|set|prune)(_\w+)?|_?initialize\w*|from_\w+|post_init|extra_repr"
    r"|get_(input|output)_embeddings"
)
_OWN_LIBRARIES = ("torch", "leanvocab")


@dataclass(frozen=True)
class Read:
    """A place that reads a weight: `attributes` lead from `self` to the module that holds it."""

    where: str
    attributes: tuple[str, ...]
    asks: str  # the attribute of the weight that is used; "" where it is passed on
    is_certain: bool  # True where each forward of that module comes there
    is_of_rows: bool = False  # True where it may be a read of rows by their ids, which the guard answers
    library: str = ""  # whose module it is

    def __str__(self) -> str:
        return f"{self.where} {f'calls {self.asks} on' if self.asks else 'reads'} the weight of"


def reads_of(model: "nn.Module", modules: Collection["nn.Module"]) -> list[Read]:
    """The places where the code of `model` reads the weights of `modules` around them; those that are certain first."""
    wanted = {id(each) for each in modules}
    found = [read for owner, paths in _above(model, wanted) for read in _reads_in_module(owner, paths, wanted)]
    return sorted(dict.fromkeys(found), key=lambda read: not read.is_certain)


def methods_of(holder: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of a class, or of a module itself, that may compute something, by their names."""
    return ((name, value) for name, value in vars(holder).items() if not _ASIDE.fullmatch(name))


def _above(model: "nn.Module", wanted: set[int]) -> Iterator[tuple["nn.Module", list[tuple[str, ...]]]]:
    """The wanted modules and all above them, with the paths from each that lead to wanted ones."""
    below: defaultdict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in wanted:
            names = tuple(filter(None, path.split(".")))
            for depth in range(len(names) + 1):
                below[names[:depth]].append(names[depth:])
    return ((model.get_submodule(".".join(above)), paths) for above, paths in below.items())


def _reads_in_module(owner: "nn.Module", paths: list[tuple[str, ...]], wanted: set[int]) -> Iterator[Read]:
    holders = [owner, *(each for each in type(owner).__mro__ if not _is_of_library(each))]
    runs: Any = next((vars(each)["forward"] for each in holders if "forward" in vars(each)), None)
    for name, value in (method for holder in holders for method in methods_of(holder)):
        where = f"{type(owner).__name__}.{name}"
        if is_compiled(value):
            yield from (Read(where, path, "", False) for path in paths)
        for function in _functions_from(value):
            is_forward = value is runs and function is inspect.unwrap(value)
            for read in _reads_in(function, where, owner, paths, wanted):
                library = type(owner).__module__.split(".")[0]
                yield replace(read, is_certain=read.is_certain and is_forward, library=library)


def _functions_from(value: Any) -> list[types.FunctionType]:
    """The functions that an attribute runs, and those that they name, which may be handed all that they have."""
    found = [each for each in functions_in(value) if not _is_of_library(each)]
    named: list[Any] = []
    for function in found:
        names, around = names_of(function), function.__globals__
        known = [around[name] for name in names if name in around]
        rooms = [vars(each) for each in known if isinstance(each, types.ModuleType) and not _is_of_library(each)]
        named += [*known, *(room[name] for room in rooms for name in names if name in room)]
    functions = (each for each in named if isinstance(each, types.FunctionType) and not _is_of_library(each))
    return list(dict.fromkeys([*found, *functions]))


def _is_of_library(value: Any) -> bool:
    """True for what is known to read no weight around its module."""
    module = getattr(value, "__module__", None) or getattr(value, "__name__", "")
    return str(module).split(".")[0] in _OWN_LIBRARIES or value is getattr(
        builtins, getattr(value, "__name__", ""), None
    )


def _reads_in(
    function: types.FunctionType, where: str, owner: "nn.Module", paths: list[tuple[str, ...]], wanted: set[int]
) -> Iterator[Read]:
    names = names_of(function)
    if "weight" not in names and not any(names.issuperset(filter(str.isidentifier, path)) for path in paths if path):
        return
    uses = _uses_in(function)
    if uses is None:
        yield from (Read(where, path, "", False) for path in paths)
        return
    code = function.__code__
    count = code.co_argcount + code.co_kwonlyargcount
    starts = {**function.__globals__, **captured(function), **dict.fromkeys(code.co_varnames[:count], owner)}
    if code.co_flags & inspect.CO_VARARGS:
        starts[code.co_varnames[count]] = [owner]
    for use in uses:
        name, *attributes = use.path
        if any(id(each) in wanted for each in _reached(starts.get(name), attributes)):
            is_certain = use.is_certain and bool(attributes) and code.co_varnames[:1] == (name,)
            yield Read(where, tuple(attributes), use.asks, is_certain, use.is_of_rows)


@once_a_code
def _uses_in(function: types.FunctionType) -> list[Use] | None:
    syntax = syntax_of(function)
    return None if syntax is None else uses_in(syntax)


def _reached(start: Any, attributes: list[str]) -> list[Any]:
    """The objects that attributes lead to; no code runs but the two methods that give a model's own tables."""
    owners = [start]
    for name in attributes:
        owners = [each for owner in owners for each in _inside(owner, name)]
    return owners


def _inside(owner: Any, name: str) -> list[Any]:
    kept = attributes_of(owner)
    modules = kept["_modules"] if isinstance(kept.get("_modules"), dict) else {}
    if name == ANY:
        values = modules if modules and hasattr(type(owner), "__getitem__") else owner
        return list(values.values() if isinstance(values, dict) else values if isinstance(values, list | tuple) else ())
    if name in ("get_input_embeddings()", "get_output_embeddings()"):
        try:
            return [getattr(owner, name[:-2])()]
        except (AttributeError, NotImplementedError, TypeError):
            return []
    return [found[name] for found in (kept, modules) if name in found]
