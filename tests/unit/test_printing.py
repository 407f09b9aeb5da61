"""Results of commands, as a machine and as a person read them."""

import json
import math
from pathlib import Path

import pytest
from rich.table import Table

from leanvocab.cli.printing import print_json, print_rich


def test_json_has_null_for_what_it_has_no_word_for_and_paths_as_texts(capsys):
    print_json({"scores": [math.nan, math.inf, 0.1], "output": Path("out"), "num_rows": 3})
    printed = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(word))
    assert printed == {"scores": [None, None, 0.1], "output": "out", "num_rows": 3}


def test_brackets_in_tokens_and_paths_are_shown(capsys):
    table = Table("token", title="[run 1]")
    table.add_row("[unused7]")
    print_rich(table, "written to out[1]")
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("[run 1]", "[unused7]", "out[1]"))
