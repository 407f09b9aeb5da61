"""The front door: small, light, and what `__all__` says."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import leanvocab

HEAVY = ("torch", "transformers", "datasets", "numpy", "pyarrow")
HELP = ["", "count", "estimate", "finetune", "info"]


def loaded_by(code):
    """Names of the top-level packages that a fresh Python has loaded after some code."""
    report = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    command = [sys.executable, "-c", f"try:\n    {code}\nfinally:\n    {report}"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(shown.stderr.splitlines()[-1].split())


def test_importing_loads_nothing_heavy():
    assert loaded_by("import leanvocab").isdisjoint(HEAVY)


@pytest.mark.parametrize("command", HELP)
def test_help_loads_nothing_heavy(command):
    words = [*command.split(), "--help"]
    code = f"import sys; sys.argv = ['leanvocab', *{words!r}]; from leanvocab.cli import main; main()"
    loaded = loaded_by(code)
    assert "typer" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_this_way_of_looking_would_notice_a_heavy_import():
    assert "numpy" in loaded_by("from leanvocab import PartialVocabulary")
    assert {"torch", "numpy"} <= loaded_by("from leanvocab import shrink_")


def test_there_are_at_most_twenty_public_names():
    assert len(leanvocab.__all__) == len(set(leanvocab.__all__)) <= 21


def test_all_is_the_public_surface():
    rooms = {file.stem for file in Path(leanvocab.__file__).parent.iterdir() if file.suffix == ".py" or file.is_dir()}
    for name in leanvocab.__all__:
        getattr(leanvocab, name)
    public = {name for name in vars(leanvocab) if not name.startswith("_")} - rooms
    assert public - {"import_module", "Any", "TYPE_CHECKING"} == set(leanvocab.__all__) - {"__version__"}
    assert dir(leanvocab) == sorted(leanvocab.__all__)


def test_type_checkers_see_the_same_names_as_python():
    tree = ast.parse(inspect.getsource(leanvocab))
    seen = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("leanvocab.")
        for alias in node.names
    }
    assert seen == set(leanvocab.__all__) - {"__version__"}


def test_no_public_name_hides_a_room():
    for name in leanvocab.__all__:
        assert not (Path(leanvocab.__file__).parent / f"{name}.py").exists(), name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'leanvocab' has no attribute 'prune'"):
        _ = leanvocab.prune


def test_every_public_function_and_class_says_what_it_does():
    for name in set(leanvocab.__all__) - {"__version__"}:
        assert inspect.getdoc(getattr(leanvocab, name)), name


# --- what the reference lists -----------------------------------------------------------------------------------------

REPOSITORY = Path(__file__).resolve().parents[2]
REFERENCE = (REPOSITORY / "docs" / "reference.md").read_text()
LISTED = set(re.findall(r"^\| `(leanvocab\.[\w.]+)`", REFERENCE, re.M))


def test_the_reference_lists_the_front_door():
    assert set(re.findall(r"^\| `lv\.(\w+)`", REFERENCE, re.M)) == set(leanvocab.__all__) - {"__version__"}


@pytest.mark.parametrize("name", sorted(LISTED))
def test_what_the_reference_lists_is_there_and_says_what_it_does(name):
    module, _, attribute = name.rpartition(".")
    found = (
        importlib.import_module(name) if module == "leanvocab" else getattr(importlib.import_module(module), attribute)
    )
    assert inspect.getdoc(found)


def test_guides_and_examples_import_public_names_alone():
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md"), *(REPOSITORY / "examples").glob("*.py")]
    code = "\n".join(page.read_text() for page in pages)
    found = {
        f"{module}.{name.split()[0]}"
        for module, names in re.findall(r"^\s*from (leanvocab[\w.]*) import ([\w, ]+)$", code, re.M)
        for name in names.split(", ")
    }
    public = LISTED | {f"leanvocab.{name}" for name in leanvocab.__all__}
    assert {name for name in found if name not in public and name.rpartition(".")[0] not in public} == set()
