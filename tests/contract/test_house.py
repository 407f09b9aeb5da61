"""The layout of the house: few rooms in few wings, small functions, plain words, and no reach into another room's own names."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from torch.utils._device import _device_constructors

REPOSITORY = Path(__file__).parents[2]
SOURCE = REPOSITORY / "src" / "leanvocab"
WINGS = (
    "vocabulary", "files", "partial", "reads", "output", "model", "checkpoints", "reports", "texts", "adapters", "trainers",
    "trimming", "finetune", "cli",
)  # fmt: skip
CODE = ("src", "tests", "doors", "benchmarks", "reproduction", "studies", "demo", "examples", "docs", "website")


@cache
def trees(*folders: str) -> dict[Path, ast.Module]:
    """The parsed modules of some folders, by their paths."""
    files = (path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py")))
    return {path.relative_to(REPOSITORY): ast.parse(path.read_text()) for path in files}


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != "__pycache__"}


# --- layout -----------------------------------------------------------------------------------------------------------


def test_wings_stand_at_the_top_beside_few_files() -> None:
    top = entries(SOURCE)
    assert {name for name in top if (SOURCE / name).is_dir()} == set(WINGS)
    assert len(top) <= 21, sorted(top)


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_has_at_most_twelve_rooms(wing: str) -> None:
    assert len(entries(SOURCE / wing) - {"__init__.py"}) <= 12


@pytest.mark.parametrize("wing", [wing for wing in WINGS if wing != "cli"])
def test_a_wing_itself_is_a_docstring_alone(wing: str) -> None:
    tree = ast.parse((SOURCE / wing / "__init__.py").read_text())
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


def test_what_lies_at_a_path_is_asked_in_one_room() -> None:
    """`Path.exists` and its kin say False from Python 3.14 on where permission is missing; os.path's always did."""
    asks = re.compile(r"\.(is_dir|is_file|exists|isdir|isfile|lexists)$")
    asked = [
        f"{path}:{node.lineno}"
        for path, tree in trees("src").items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and asks.search(ast.unparse(node.func))
    ]
    assert asked == [], "see leanvocab.files.presence"


# --- functions and words ----------------------------------------------------------------------------------------------


def test_functions_fit_on_a_screen() -> None:
    sizes = {
        f"{path}: {f.name}": f.end_lineno - f.lineno + 1 for path, tree in trees("src").items() for f in functions(tree)
    }
    long = {name: size for name, size in sizes.items() if size >= 40}
    assert len(long) <= len(sizes) / 100, long
    assert max(sizes.values()) <= 60, long


HIDING = re.compile(r"(What|Whether|Which|How|Where|When|Why|Who|As|Those|That|If)\b")


def test_nine_docstrings_in_ten_begin_with_a_noun_or_a_verb() -> None:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module
    said = {
        f"{path}: {getattr(node, 'name', '')}": text
        for path, tree in trees("src").items()
        for node in ast.walk(tree)
        if isinstance(node, kinds) and (text := ast.get_docstring(node))
    }
    hiding = [name for name, text in said.items() if HIDING.match(text)]
    assert len(hiding) <= len(said) / 10, "\n".join(hiding)


# --- no private reach -------------------------------------------------------------------------------------------------


def own_names(tree: ast.Module) -> set[str]:
    """Names with one leading underscore that a module makes: functions, classes, constants, attributes."""
    made: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            made.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in made if re.fullmatch(r"_[^_]\w*", name)}


def reached_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Names with one leading underscore that a module asks another thing than itself for, by code or in a string to patch."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("leanvocab"):
            yield from ((node.lineno, alias.name) for alias in node.names if re.fullmatch(r"_[^_]\w*", alias.name))
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"_[^_]\w*", node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from (
                (node.lineno, name) for name in re.findall(r"^(?:leanvocab\.[\w.]+\.)?(_[a-zA-Z]\w*)$", node.value)
            )


# What torch, transformers, accelerate, peft and datasets call by the same names; these are theirs.
OTHERS = {
    "_apply", "_backward_hooks", "_buffers", "_data", "_fields", "_format_type", "_forward_hooks", "_forward_pre_hooks",
    "_indices", "_modules", "_parameters", "_values", "_version",
}  # fmt: skip


def test_nothing_outside_a_module_reads_its_own_names() -> None:
    made = {path: own_names(tree) for path, tree in trees("src").items()}
    every = set().union(*made.values()) - OTHERS
    reaching = [
        f"{path}:{line} {name}"
        for path, tree in trees(*CODE).items()
        for line, name in reached_names(tree)
        if name in every and name not in own_names(tree)
    ]
    assert not reaching, "\n".join(reaching)


def test_this_way_of_looking_would_notice_a_reach() -> None:
    tree = ast.parse("from leanvocab.a import _x\nmodule._y\nself._z\npatch('leanvocab.a.b._v')\nsetattr(m, '_w', 1)")
    assert sorted(name for _, name in reached_names(tree)) == ["_v", "_w", "_x", "_y"]


def test_every_tensor_is_made_on_a_device_that_is_named() -> None:
    """Or else it would be made on the default device, which may be set to another one than it is needed on."""
    makers = {function.__name__ for function in _device_constructors()}
    nameless = [
        f"{path}:{call.lineno} torch.{call.func.attr}"
        for path, tree in trees("src").items()
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
        if isinstance(call.func.value, ast.Name) and call.func.value.id == "torch" and call.func.attr in makers
        if not any(keyword.arg in ("device", None) for keyword in call.keywords)
    ]
    assert nameless == []
