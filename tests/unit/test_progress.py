"""The progress bar: it shows when asked for, and by itself once work has taken long, on a terminal or where it may anywhere."""

import subprocess
import sys

import pytest

from leanvocab.progress import ProgressBar

LIGHT = """
import sys
from leanvocab.progress import ProgressBar
for wanted in (None, False):
    bar = ProgressBar("work", 2, wanted)
    bar.add(2)
    bar.close()
assert "tqdm" not in sys.modules
"""


def shown(capsys: pytest.CaptureFixture[str], *args: object, **options: object) -> str:
    bar = ProgressBar("work", 3, *args, **options)  # type: ignore[arg-type]
    bar.add(1)
    bar.add(2)
    bar.close()
    return capsys.readouterr().err


def test_a_bar_that_is_asked_for_shows_what_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, True, unit=" rows")
    assert "work: 100%" in text
    assert "3.00/3.00" in text


def test_a_bar_shows_by_itself_once_the_work_has_taken_long(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, anywhere=True) == ""
    assert "3.00/3.00" in shown(capsys, anywhere=True, after_seconds=-1.0)
    assert shown(capsys, after_seconds=-1.0) == ""  # no terminal
    assert shown(capsys, False, anywhere=True, after_seconds=-1.0) == ""


def test_short_work_does_not_import_tqdm() -> None:
    assert subprocess.run([sys.executable, "-c", LIGHT], check=False).returncode == 0
