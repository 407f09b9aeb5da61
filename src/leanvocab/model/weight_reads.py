"""Which code of a model reads a vocabulary matrix itself, around the module that holds it: told from the code, not by running it.

Looks for `self.….weight` in the methods of a model's modules and follows the attributes from the module that runs them, so
that what counts is which module is meant, not what it is called. What is passed around in variables is not seen here; the
guard sees that in the first forward.
"""

import dis
import re
import types
import weakref
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from leanvocab.partial.tensor_questions import ATTRIBUTES, METHODS

# What asks about a weight and reads none of its rows.
_HARMLESS = METHODS | ATTRIBUTES | {"data_ptr", "requires_grad", "requires_grad_"}
# Not a part of computing: building, tying, resizing, saving.
_ASIDE = re.compile(
    r"^(__\w+__|_?init|_?tie|_?resize|get_|set_|_?reset|_?load|_?save|from_|post_init|extra_repr|prune)"
)
_OWN_LIBRARIES = ("torch", "leanvocab", "builtins")


@dataclass(frozen=True)
class Read:
    """A place that reads a weight: `attributes` lead from `self` to the module that holds it."""

    where: str
    attributes: tuple[str, ...]
    asks: str  # the attribute of the weight that is used; "" where it is passed on
    is_certain: bool  # whether each forward of that module comes there

    def __str__(self) -> str:
        return f"{self.where} {f'calls {self.asks} on' if self.asks else 'reads'} the weight of"


def reads_of(model: nn.Module, modules: Collection[nn.Module]) -> list[Read]:
    """Where the code of `model` reads the weights of `modules` around them; those that are certain first."""
    wanted = {id(each) for each in modules}
    found = [
        read
        for each in model.modules()
        if id(each) not in wanted
        for read in _reads_in(type(each))
        if id(_follow(each, read.attributes)) in wanted
    ]
    return sorted(dict.fromkeys(found), key=lambda read: not read.is_certain)


def _follow(module: nn.Module, attributes: tuple[str, ...]) -> Any:
    owner: Any = module
    for name in attributes:
        if not isinstance(owner, nn.Module):
            return None
        owner = owner._modules.get(name)
    return owner


_known: "weakref.WeakKeyDictionary[type, tuple[Read, ...]]" = weakref.WeakKeyDictionary()


def _reads_in(cls: type) -> tuple[Read, ...]:
    if cls not in _known:
        _known[cls] = tuple(dict.fromkeys(_find_reads(cls)))
    return _known[cls]


def _find_reads(cls: type) -> Iterator[Read]:
    for base in cls.__mro__:
        if base.__module__.split(".")[0] in _OWN_LIBRARIES:
            continue
        for name, value in base.__dict__.items():
            code = getattr(unwrapped(value), "__code__", None)
            if code is not None and not _ASIDE.match(name):
                runs = name == "forward" and getattr(cls, "forward", None) is value
                for attributes, asks, is_certain in _weights_in(code):
                    yield Read(f"{cls.__name__}.{name}", attributes, asks, is_certain and runs)


def unwrapped(function: Any) -> Any:
    """What decorators that say so were put around."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _weights_in(code: types.CodeType) -> Iterator[tuple[tuple[str, ...], str, bool]]:
    """(attributes between `self` and `.weight`, what is asked of it, whether the function always comes there)."""
    if not code.co_varnames:
        return
    own = code.co_varnames[0]
    attributes: list[str] | None = None
    furthest, returned = 0, False  # how far a jump from before leads; whether the function may be over
    instructions = [each for each in dis.get_instructions(code) if each.opname not in ("CACHE", "EXTENDED_ARG")]
    for place, each in enumerate(instructions):
        if each.opname.startswith("LOAD_FAST") and each.argval == own:
            attributes = []
        elif each.opname in ("LOAD_ATTR", "LOAD_METHOD") and attributes is not None:
            if each.argval == "weight" and attributes:
                following = instructions[place + 1]
                if not _is_harmless(following):
                    asks = str(following.argval) if following.opname in ("LOAD_ATTR", "LOAD_METHOD") else ""
                    yield tuple(attributes), asks, each.offset >= furthest and not returned
                attributes = None
            else:
                attributes.append(str(each.argval))
        else:
            attributes = None
        if "JUMP" in each.opname or each.opname == "FOR_ITER":
            furthest = max(furthest, each.argval if isinstance(each.argval, int) else 0)
        returned = returned or each.opname.startswith("RETURN")


def _is_harmless(following: dis.Instruction) -> bool:
    is_attribute = following.opname in ("LOAD_ATTR", "LOAD_METHOD") and following.argval in _HARMLESS
    return is_attribute or following.opname in ("IS_OP", "STORE_ATTR")
