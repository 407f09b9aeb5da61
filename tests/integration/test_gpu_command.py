"""`make gpu`: parts are processes with limits of their own, none costs another, and what came of them is written after each."""

import json
import os
import time

import pytest

from benchmarks import _gpu
from benchmarks._gpu import FOLDER, PARTS, Part, Run, beside_counted, main
from benchmarks._results import Result, Series

RESULT = Result("fits", "A title", "tiny", "cpu", machine={"torch": "2"}).to_dict()
MODULES = {
    "fails": "raise RuntimeError('this went wrong')",
    "hangs": "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-m', 'late'])\ntime.sleep(60)",
    "late": "import pathlib, time\ntime.sleep(4)\npathlib.Path(__file__).with_name('was-here').touch()",
    "absent": "",
    "works": f"import json\nprint(json.dumps({RESULT!r}))",
}


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A module each."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(_gpu, "LEAST_SECONDS", 1.0)
    return (
        Part("fails", lambda run: ["fails"], 60, ()),
        Part("hangs", lambda run: ["hangs"], 2, ()),
        Part("absent", lambda run: ["absent"], 60, ("no_such_package",)),
        Part("works", lambda run: ["works"], 60, ()),
    )


def test_a_part_that_fails_hangs_or_is_absent_stops_no_other(tmp_path, capsys, parts):
    assert main(["--device", "cpu", "--tiny", "--out", str(tmp_path)], parts) == 2
    content = json.loads((tmp_path / "gpu.json").read_text())
    outcomes = {each["name"]: (each["status"], each["why"]) for each in content["parts"]}
    assert outcomes == {
        "fails": ("failed", "exit status 1"),
        "hangs": ("over its limit", "of 2 s"),
        "absent": ("skipped", "not installed: no_such_package"),
        "works": ("done", ""),
    }
    page = (tmp_path / "gpu.md").read_text()
    assert "| absent | skipped not installed: no_such_package | 0 s |" in page
    assert "this went wrong" in page
    assert "### A title" in page
    assert "No GPU: this shows that the parts run" in page
    assert "works: done" in capsys.readouterr().out


def test_files_are_written_after_each_part(tmp_path, monkeypatch):
    """A machine that is taken away keeps what was done before."""

    def run_part(part, run):
        if part.name == "second":
            raise KeyboardInterrupt
        return _gpu.Done(part.name, "done")

    monkeypatch.setattr(_gpu, "run_part", run_part)
    two = tuple(Part(name, lambda run: [], 60) for name in ("first", "second"))
    with pytest.raises(KeyboardInterrupt):
        main(["--device", "cpu", "--tiny", "--out", str(tmp_path)], two)
    assert [each["name"] for each in json.loads((tmp_path / "gpu.json").read_text())["parts"]] == ["first"]


def test_what_a_part_has_started_ends_with_it(tmp_path, parts):
    assert _gpu.run_part(parts[1], Run("cpu", True, 2.0)).status == "over its limit"
    time.sleep(4)
    assert not (tmp_path / "was-here").exists()


def test_without_a_gpu_nothing_is_run_and_the_dry_run_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(_gpu, "has_gpu", lambda: False)
    assert main(["--out", str(tmp_path)]) == 2
    assert "--device cpu --tiny" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        main(["--device", "cpu"])
    assert "give --tiny too" in capsys.readouterr().err


def test_parts_fit_into_the_time_and_no_more_is_given_than_is_left():
    assert sum(part.seconds for part in PARTS) <= 60 * _gpu.MINUTES
    done = _gpu.run_part(PARTS[0], Run("cpu", True, 3.0))
    assert (done.status, done.why) == ("skipped", "no time is left for it")


def test_counted_figures_stand_beside_those_of_the_same_case():
    series = Series("counted: peak", "bytes", "leanvocab", (95.0,), "bytes")
    counted = Result("qlora_step", "Counted", "a model", "paper", (series,), machine={})
    other = Series("peak", "bytes", "another", (1.0,), "bytes")
    measured = Result(
        "qlora_step",
        "Measured",
        "a model",
        "cuda",
        (Series("peak", "bytes", "leanvocab", (100.0,), "bytes"), other),
        machine={},
    )
    rows = list(beside_counted([measured], [counted]))
    assert rows == [["qlora_step a model", "peak, bytes", "leanvocab", "0.1 kB", "0.095 kB", "0.950"]]


def test_every_part_that_can_be_counted_has_been():
    """By `python -m benchmarks gpu --device paper`."""
    counted = json.loads((FOLDER / "counted.json").read_text())["parts"]
    assert {part["name"] for part in counted} == {part.name for part in PARTS if part.is_counted}


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path, repository, monkeypatch):
    monkeypatch.chdir(repository)
    assert main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert [each["name"] for each in content["parts"]] == [part.name for part in PARTS]
    assert {each["status"] for each in content["parts"]} <= {"done", "skipped"}
    assert os.path.getsize(tmp_path / "gpu.md") > 1000
