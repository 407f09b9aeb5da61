"""A small size of each benchmark runs and prints its figures; how fast it was is nobody's test."""

import json

import pytest

from benchmarks import shrinking, training_step
from benchmarks._results import median_interval


@pytest.mark.parametrize(
    ("benchmark", "arguments"),
    [
        (shrinking, ["--size", "tiny", "--kept", "100", "--rounds", "1"]),
        (training_step, ["--case", "tiny", "--pairs", "2", "--batch-size", "2", "--length", "8"]),
    ],
    ids=["shrinking", "training_step"],
)
def test_a_benchmark_prints_its_figures_as_json(benchmark, arguments, capsys, monkeypatch, repository) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(repository)  # its rounds are processes of their own: python -m benchmarks.NAME
    figures = benchmark.main([*arguments, "--json"])
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [each["what"] for each in printed["figures"]] == [each.what for each in figures]
    assert printed["machine"]["torch"]


def test_the_interval_of_a_median_holds_the_median_and_is_narrow_where_values_agree() -> None:
    low, high = median_interval([1.0, 2.0, 3.0, 4.0, 100.0], rounds=1000)
    assert low <= 3.0 <= high
    assert median_interval([2.0] * 9, rounds=100) == (2.0, 2.0)
