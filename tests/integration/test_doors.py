"""The doors that are fast: each combination gives what its door expects of it."""

import os
import random
import warnings
from pathlib import Path

import pytest

from doors import table
from doors.registry import Door, all_doors, problem
from doors.results import read_results

DOORS = all_doors()
FAST = [each for each in DOORS if each.fast]
# One of each kind, and half of the others; `make doors` and `make test-slow` run all.
FIRST = {door.name.partition(".")[0]: door for door in reversed(FAST)}
SAMPLE = {*FIRST.values(), *random.Random(5).sample(FAST, len(FAST) // 2)}
CASES = [pytest.param(door, id=door.name, marks=[] if door in SAMPLE else pytest.mark.slow) for door in FAST]


@pytest.mark.parametrize("door", CASES)
def test_a_combination_gives_what_its_door_expects(door: Door, tmp_path: Path) -> None:
    if door.missing():
        pytest.skip(door.missing())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other libraries warn of is not what is tested here
        assert problem(door, door.run(tmp_path)) == ""


def test_the_page_is_what_the_results_say() -> None:
    page = table.PAGE.read_text()
    assert table.rendered(page, DOORS, read_results()) == page


def test_every_door_that_can_run_here_has_been_run() -> None:
    known = read_results()
    assert [each.name for each in DOORS if each.name not in known and not each.missing()] == []


def test_every_result_is_as_its_door_expects() -> None:
    by_name = {each.name: each for each in DOORS}
    assert [name for name, each in read_results().items() if each.verdict not in _allowed(by_name[name])] == []


def _allowed(door: Door) -> tuple[str, ...]:
    return ("close", "identical") if door.expects == "close" else (door.expects,)
