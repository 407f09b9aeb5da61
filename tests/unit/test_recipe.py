"""The file of a trimming: it comes back as it was written, and what was changed in it is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leanvocab.checkpoints.delta_format import BaseTensor
from leanvocab.errors import CheckpointError
from leanvocab.trimming.recipe import Options, Recipe, Rows, Source, ranges, read_recipe
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

SHA = "0" * 63 + "a"


def a_recipe(**changes: Any) -> Recipe:
    values = {
        "base": Source("intfloat/multilingual-e5-small", {"config.json": SHA}),
        "revision": "abc",
        "base_tensors": {"table": BaseTensor("F32", (500, 4), SHA)},
        "delta": Source("delta", {"leanvocab.json": SHA}),
        "tokenizer": "base",
        "vocabulary": PartialVocabulary([0, 1, 2, 7, 9, 10, 499], 500),
        "rows": Rows(3, 2, 2, 1, 0),
        "options": Options(8, False),
        "cut": {"table": SHA},
        "written": {"config.json": SHA},
        "versions": {"leanvocab": "0.1.0"},
    }
    return Recipe(**(values | changes))


@pytest.mark.parametrize("changes", [{}, {"delta": None, "revision": None, "options": Options(None, True)}])
def test_a_recipe_comes_back_as_it_was_written(tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = a_recipe(**changes)
    (tmp_path / "trimming.json").write_text(recipe.text())
    assert read_recipe(tmp_path / "trimming.json") == recipe
    assert read_recipe(tmp_path / "trimming.json").text() == recipe.text()


def test_a_recipe_names_its_ids_in_ranges_for_a_person() -> None:
    assert '"token_ids": "0-2 7 9-10 499"' in a_recipe().text()


@given(st.sets(st.integers(0, 4999)))
def test_ranges_are_exact(tmp_path_factory: pytest.TempPathFactory, ids: set[int]) -> None:
    path = tmp_path_factory.mktemp("recipe") / "trimming.json"
    path.write_text(a_recipe(vocabulary=PartialVocabulary(sorted(ids), 5000)).text())
    assert list(read_recipe(path).vocabulary) == sorted(ids)
    assert ranges(read_recipe(path).vocabulary.token_ids).count("-") <= len(ids) // 2


def setting(*path: str, value: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (setting("version", value=2), "expected format 'leanvocab trimming', version 1, found .* 2"),
        (setting("base", value=[]), "base: expected dict, found"),
        (setting("base", "files", "config.json", value="abc"), "config.json: expected 64 hexadecimal digits"),
        (setting("vocabulary", "full_size", value=1 << 40), r"expected a full_size from 1 to 16,777,216"),
        (setting("vocabulary", "token_ids", value="0-99999999"), r"below 500, such as 0-257 300, found '0-99999999'"),
        (setting("vocabulary", "token_ids", value="5 3"), r"in order, each once, .* found '3'"),
        (setting("vocabulary", "token_ids", value="3-2"), r"found '3-2'"),
        (setting("vocabulary", "token_ids", value="3-5 5"), r"found '5'"),
        (setting("vocabulary", "token_ids", value="-1"), r"found '-1'"),
        (setting("vocabulary", "token_ids", value="1 2"), r"they were changed"),
        (setting("rows", "padding", value="1"), r"padding: expected int"),
        (setting("options", "pad_to_multiple_of", value=0), r"pad_to_multiple_of: expected null, or a number from 1"),
        (setting("output", "tensors", value={"table": 3}), r"table: expected 64 hexadecimal digits"),
        (setting("delta", value="a"), r"delta: expected dict"),
    ],
)
def test_what_was_changed_is_refused_by_name(tmp_path: Path, change: Callable[[Any], None], error: str) -> None:
    content = json.loads(a_recipe().text())
    change(content)
    (tmp_path / "trimming.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"trimming.json: .*{error}"):
        read_recipe(tmp_path / "trimming.json")
