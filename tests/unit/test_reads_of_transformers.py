"""The reads of a weight around its module in all model classes of transformers: a list for each version, for every Python.

A change of a list is looked at: `python -m tests.unit.test_reads_of_transformers` writes that of the installed version.
"""

import importlib
import json
import pkgutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers.models
from torch import nn

from leanvocab.reads.function_source import functions_in, names_of, syntax_of
from leanvocab.reads.weight_reads import methods_of
from leanvocab.reads.weight_uses import uses_in

KNOWN = Path(__file__).parents[1] / "data" / "reads_of_transformers"


def classes() -> Iterator[type[nn.Module]]:
    """The module classes that the models' files define."""
    for info in pkgutil.walk_packages(transformers.models.__path__, "transformers.models."):
        if ".modeling_" in info.name:
            try:
                module = importlib.import_module(info.name)
            except ImportError:  # of what is not installed
                continue
            own = (each for each in vars(module).values() if getattr(each, "__module__", "") == module.__name__)
            yield from (each for each in own if isinstance(each, type) and issubclass(each, nn.Module))


def reads_by_class() -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for cls in classes():
        for function in (function for _, value in methods_of(cls) for function in functions_in(value)):
            if "weight" not in names_of(function):
                continue
            syntax = syntax_of(function)
            assert syntax is not None, f"{cls.__name__}.{function.__name__} has no source"
            own = function.__code__.co_varnames[:1]
            paths = {use.path[1:] for use in uses_in(syntax) if use.is_of_weight and use.path[:1] == own}
            if any(paths):
                name = f"{cls.__module__.removeprefix('transformers.models.')}.{cls.__qualname__}"
                found.setdefault(name, set()).update(".".join(path) for path in paths if path)
    return {name: sorted(paths) for name, paths in sorted(found.items())}


@pytest.mark.slow  # it imports every model of transformers
@pytest.mark.filterwarnings("ignore")
def test_the_reads_in_transformers_are_those_that_were_looked_at() -> None:
    found = reads_by_class()  # of any version: each function has a source
    known = KNOWN / f"{transformers.__version__}.json"
    if not known.exists():
        pytest.skip(f"no list of transformers {transformers.__version__} is kept")
    assert found == json.loads(known.read_text())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    (KNOWN / f"{transformers.__version__}.json").write_text(json.dumps(reads_by_class(), indent=1) + "\n")
