"""A few seconds of the fuzzer over the readers; `make fuzz` runs it for ten minutes."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_a_few_seconds_of_fuzzing_find_no_crash() -> None:
    pytest.importorskip("atheris", reason="atheris is not installed (it has no wheel for every system)")
    command = [sys.executable, str(HERE / "fuzz_readers.py"), "--seconds", "5", "--corpus", str(HERE / "corpus")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    executed = next(line for line in done.stderr.splitlines() if "number_of_executed_units" in line)
    assert int(executed.split()[-1]) > 50
