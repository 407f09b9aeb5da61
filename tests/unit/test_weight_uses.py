"""Uses of a weight in the source of a function, and the source itself: no torch, and alike on every Python."""

import argparse
import ast
import functools
import linecache
import subprocess
import sys
import textwrap
import types
import warnings
from pathlib import Path
from typing import Any

import pytest

from leanvocab.reads.function_source import functions_in, is_compiled, names_of, syntax_of
from leanvocab.reads.weight_uses import uses_in

CERTAIN, MAYBE = True, False


def parsed(text: str) -> ast.FunctionDef:
    """A method with a body."""
    body = "\n    ".join(text.strip("\n").split("\n"))
    (syntax,) = ast.parse(f"def forward(self, ids, pad=False):\n    {body}").body
    assert isinstance(syntax, ast.FunctionDef)
    return syntax


def uses(text: str) -> list[tuple[str, str, bool]]:
    """The uses of weights that begin at `self`, in the body of a method."""
    found = [each for each in uses_in(parsed(text)) or () if each.is_of_weight and each.path[0] == "self"]
    return [(".".join(each.path[1:]), each.asks, each.is_certain) for each in found]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f(ids, self.table.weight)", [("table", "", CERTAIN)]),  # one instruction loads both on 3.13
        ("F.linear(ids, self.lm_head.weight)", [("lm_head", "", CERTAIN)]),
        ("F.linear(ids, weight=self.a.b.weight)", [("a.b", "", CERTAIN)]),
        ("f(*(ids, self.table.weight))", [("table", "", CERTAIN)]),
        ("f(**{'weight': self.table.weight})", [("table", "", CERTAIN)]),
        ("f'{self.table.weight}'", [("table", "", CERTAIN)]),
        ("return ids @ self.table.weight.t()", [("table", "t", CERTAIN)]),
        ("self.table.weight[1]", [("table", "", CERTAIN)]),
        ("self.table.weight[1] = 0", [("table", "", CERTAIN)]),
        ("self.table.weight.data[1] = 0", [("table", "data", CERTAIN)]),
        ("self.table.weight += 1", [("table", "", CERTAIN)]),
        ("with f(self.table.weight):\n    pass", [("table", "", CERTAIN)]),
        ("with no_grad():\n    f(self.table.weight)", [("table", "", CERTAIN)]),
        ("functools.partial(f, weight=self.table.weight)(ids)", [("table", "", CERTAIN)]),
        # functions within the function
        ("return map(lambda x: x @ self.table.weight, ids)", [("table", "", MAYBE)]),
        ("return (x @ self.table.weight for x in ids)", [("table", "", MAYBE)]),
        ("return [x for x in self.table.weight]", [("table", "", CERTAIN)]),
        ("return {x: 1 for x in ids if x in self.table.weight}", [("table", "", MAYBE)]),
        ("def score(x):\n    return x @ self.table.weight\nreturn score(ids)", [("table", "", MAYBE)]),
        ("async def score(x):\n    return self.table.weight", [("table", "", MAYBE)]),
        ("class Inner:\n    rows = self.table.weight", [("table", "", MAYBE)]),
        ("def run(x=self.table.weight):\n    pass", [("table", "", MAYBE)]),
        # other names
        ("table = self.table\nreturn f(table.weight)", [("table", "", CERTAIN)]),
        ("weight = self.table.weight\nreturn f(ids, weight)", [("table", "", CERTAIN)]),
        ("weight = self.table.weight\nif pad:\n    f(weight)", [("table", "", MAYBE)]),
        ("if (table := self.table) is not None:\n    f(table.weight)", [("table", "", MAYBE)]),
        ("f(weight := self.table.weight)", [("table", "", CERTAIN)]),
        ("model = self\nf(model.table.weight)", [("table", "", CERTAIN)]),
        ("inner = self.inner\ntable = inner.table\nf(table.weight)", [("inner.table", "", CERTAIN)]),
        ("def run():\n    f(table.weight)\ntable = self.table\nrun()", [("table", "", MAYBE)]),
        ("table, other = self.table, ids\nf(table.weight)", [("table", "", MAYBE)]),
        ("table = self.a if pad else self.b\nf(table.weight)", [("a", "", MAYBE), ("b", "", MAYBE)]),
        ("table = self.a or self.b\nf(table.weight)", [("a", "", MAYBE), ("b", "", MAYBE)]),
        ("rows = None\nif pad:\n    rows = self.table.weight\nf(rows)", [("table", "", MAYBE)]),
        ("a = b = self.table.weight", [("table", "", CERTAIN)]),
        ("global rows\nrows = self.table.weight", [("table", "", CERTAIN)]),
        ("self.rows = self.table.weight", [("table", "", CERTAIN)]),
        ("f(getattr(self.table, 'weight'))", [("table", "", MAYBE)]),
        ("f(getattr(self.table, 'weight', None))", [("table", "", MAYBE)]),
        ("f(getattr(self, 'table').weight)", [("table", "", MAYBE)]),
        ("f(self.table._parameters['weight'])", [("table", "", MAYBE)]),
        ("f(self._modules['table'].weight)", [("table", "", MAYBE)]),
        ("f(self.get_submodule('a.b').weight)", [("a.b", "", MAYBE)]),
        ("f(self.get_parameter('a.b.weight'))", [("a.b", "", MAYBE)]),
        ("f(self.get_input_embeddings().weight)", [("get_input_embeddings()", "", MAYBE)]),
        ("f(super().table.weight)", [("table", "", MAYBE)]),
        # elements
        ("f(self.heads[2].weight)", [("heads.*", "", MAYBE)]),
        ("for head in self.heads:\n    f(head.weight)", [("heads.*", "", MAYBE)]),
        ("for i, head in enumerate(self.heads):\n    f(head.weight)", [("heads.*", "", MAYBE)]),
        ("for head in self.heads.values():\n    f(head.weight)", [("heads.*", "", MAYBE)]),
        ("for table in (self.a, self.b):\n    f(table.weight)", [("a", "", MAYBE), ("b", "", MAYBE)]),
        ("f([head.weight for head in self.heads])", [("heads.*", "", MAYBE)]),
        ("first, *others = self.heads\nf(first.weight)", [("heads.*", "", MAYBE)]),
        # where each run comes
        ("if pad:\n    f(self.table.weight)", [("table", "", MAYBE)]),
        ("if pad and self.table.weight[0]:\n    pass", [("table", "", MAYBE)]),
        ("f(self.table.weight) if pad else f(ids)", [("table", "", MAYBE)]),
        ("while f(self.table.weight):\n    pass", [("table", "", CERTAIN)]),
        ("for _ in ids:\n    f(self.table.weight)", [("table", "", MAYBE)]),
        ("try:\n    f(self.table.weight)\nexcept E:\n    pass", [("table", "", MAYBE)]),
        ("match pad:\n    case True:\n        f(self.table.weight)", [("table", "", MAYBE)]),
        ("if pad:\n    return ids\nf(self.table.weight)", [("table", "", MAYBE)]),
        ("def inner():\n    return 1\nf(self.table.weight)", [("table", "", CERTAIN)]),
        ("return ids\nf(self.table.weight)", []),
        # what reads no rows
        ("if self.table.weight is None:\n    pass", []),
        ("if self.table.weight is self.head.weight is not None:\n    pass", []),
        ("ids.to(self.table.weight.dtype, self.table.weight.device)", []),
        ("self.table.weight.shape[0] == self.table.weight.size(1)", []),
        ("self.table.weight = ids", []),
        ("self.table.weight.data = ids", []),
        ("del self.table.weight", []),
        ("isinstance(self.table.weight, Tensor) and len(self.table.weight)", []),
        ("weight = self.table.weight\nreturn ids.to(weight.dtype)", []),
        ("self.weight * ids", [("", "", CERTAIN)]),  # its own
        ("f(weight, ids.weight, self.table(ids))", []),
    ],
)  # fmt: skip
def test_uses_are_found_in_the_source(text: str, expected: list[tuple[str, str, bool]]) -> None:
    assert sorted(uses(text)) == sorted(expected)


@pytest.mark.parametrize(
    "text",
    ["f(ids, self.table)", "return self.table", "f(x=[self.table])", "self.other = self.table", "getattr(self.table, pad)"],
)  # fmt: skip
def test_a_module_that_is_handed_on_is_a_use_of_it(text: str) -> None:
    (syntax,) = ast.parse(f"def run(self, ids, pad):\n {text}").body
    assert isinstance(syntax, ast.FunctionDef)
    assert ("self", "table") in {each.path for each in uses_in(syntax) or () if not each.is_of_weight}


@pytest.mark.parametrize(
    "text", ["self.table(ids)", "self.table.scale", "self.table is None", "not self.table", "x = self.table"]
)
def test_a_module_that_is_called_or_asked_about_is_not_handed_on(text: str) -> None:
    (syntax,) = ast.parse(f"def run(self, ids):\n {text}").body
    assert isinstance(syntax, ast.FunctionDef)
    assert ("self", "table") not in {each.path for each in uses_in(syntax) or ()}


def test_variables_that_stand_for_themselves_are_followed_to_an_end() -> None:
    assert ("next", "", MAYBE) in uses("node = self\nwhile node:\n    node = node.next\n    f(node.weight)")
    everything = "\n".join(f"x = x.a{i}\nx = x.b{i}" for i in range(10))
    assert uses_in(parsed(f"x = self\n{everything}\nf(x.weight)")) is None


# --- the source of a function -----------------------------------------------------------------------------------------

TEXT = '''
from __future__ import annotations
import functools
from math import sqrt

def noted(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)
    return wrapper

def unsaid(function):
    def wrapper(*args):
        return function(*args)
    return wrapper

class Model:
    __factor: int = 2

    def plain(self, x):
        """Text
        over lines."""
        return sqrt(x) * functools.reduce(x, self.table.weight)

    @noted
    @noted
    def wrapped(self, x):
        y: int = self.__factor
        return super(Model, self).f(x) @ self.table.weight + (lambda z: z * y)(x)

    @unsaid
    def hidden(self): return self.table.weight

    @property
    def rows(self):
        return self.table.weight

    @functools.cached_property
    def kept(self):
        return self.table.weight

    @staticmethod
    def given(model): return model.table.weight

    partly = functools.partialmethod(plain, 3)
    short = lambda self: self.table.weight

    def warned(self):
        return self.table.weight if self is 3 else "\\d"

    class Deeper:
        def plain(self):
            assert self.table.weight, "none"
            def inner(a=__debug__): return self.table.weight, __class__
            return [x for x in inner()]

def make(size):
    class Local:
        def sized(self): return super(Local, self), self.table.weight[size]
    return Local

Local = make(3)
'''


def load(path: Path, text: str = TEXT) -> dict[str, Any]:
    path.write_text(text)
    names: dict[str, Any] = {"__name__": "loaded", "__file__": str(path)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(text, str(path), "exec"), names)
    return names


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("Model", "plain"), ("Model", "wrapped"), ("Model", "hidden"), ("Model", "rows"), ("Model", "kept"), ("Model", "given"),
        ("Model", "partly"), ("Model", "short"), ("Model", "warned"), ("Deeper", "plain"), ("Local", "sized"),
    ],
)  # fmt: skip
def test_the_source_of_every_kind_of_method_is_found_and_read(tmp_path: Path, owner: str, name: str) -> None:
    names = load(tmp_path / "kinds.py")
    names["Deeper"] = names["Model"].Deeper
    functions = list(functions_in(vars(names[owner])[name]))
    syntaxes = [syntax_of(function) for function in functions]
    assert None not in syntaxes
    found = [use for syntax in syntaxes if syntax for use in uses_in(syntax) if use.is_of_weight]
    assert {use.path[1:] for use in found} == {("table",)}
    assert any({"table", "weight"} <= names_of(each) for each in functions)


@pytest.mark.parametrize("module", [argparse, ast, textwrap])
def test_the_source_of_all_functions_of_a_library_is_found(module: types.ModuleType) -> None:
    kinds = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__]
    own = [value for kind in [module, *kinds] for value in vars(kind).values()]
    functions = [each for value in own for each in functions_in(value) if each.__module__ == module.__name__]
    assert len(functions) > 9
    assert [each for each in functions if each.__name__ != "__annotate__" and syntax_of(each) is None] == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("self.table.weight)", "self.other.weight)"),  # another name
        ("class Model:", "\n" * 99 + "class Model:"),
        ("x, self.table.weight)", "self.table.weight, x)"),  # the same names in another order
        ("sqrt(x) *", "sqrt(x) +  2 *"),
        ("sqrt(x) *", "sqrt(x) /"),
        (TEXT, ""),
        (TEXT, "def plain(self, x:\n" * 30),
        (TEXT, "'''\n" * 31),
    ],
)  # fmt: skip
def test_a_file_that_has_changed_since_is_no_source(tmp_path: Path, before: str, after: str) -> None:
    path = tmp_path / "changing.py"
    plain = load(path)["Model"].plain
    path.write_text(TEXT.replace(before, after))
    linecache.clearcache()
    assert syntax_of(plain) is None
    path.write_text(TEXT)
    linecache.clearcache()
    assert syntax_of(plain) is not None


def test_two_edits_of_the_same_names_are_told_apart(tmp_path: Path) -> None:
    text = "def run(self, x):\n    y = self.head(self.table(x))\n    return y @ self.table.weight\n"
    run = load(tmp_path / "edited.py", text)["run"]
    (tmp_path / "edited.py").write_text(text.replace("table.weight", "head.weight"))
    assert syntax_of(run) is None


def test_code_without_source_has_none_and_a_notebooks_cell_has() -> None:
    names: dict[str, Any] = {}
    text = "def cell(self):\n    return self.table.weight\n"
    exec(compile(text, "<cell 3>", "exec"), names)
    assert syntax_of(names["cell"]) is None
    linecache.cache["<cell 3>"] = (len(text), None, text.splitlines(keepends=True), "<cell 3>")
    try:
        assert syntax_of(names["cell"]) is not None
    finally:
        del linecache.cache["<cell 3>"]


def test_a_method_of_no_python_code_is_known_as_one() -> None:
    assert is_compiled(str.join)
    for value in (len, load, 3, property(load), staticmethod(len), functools.partial(len), types.SimpleNamespace, None):
        assert not is_compiled(value)


def test_nothing_heavy_is_loaded_for_it() -> None:
    code = "import sys, leanvocab.reads.weight_reads; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
