"""A few seconds of each fuzzer: over the readers, and over the command; `make fuzz` runs them for ten minutes."""

import subprocess
import sys
from pathlib import Path

import fuzz_commands
import pytest

HERE = Path(__file__).parent


def test_a_few_seconds_of_fuzzing_find_no_crash() -> None:
    pytest.importorskip("atheris", reason="atheris is not installed (it has no wheel for every system)")
    command = [sys.executable, str(HERE / "fuzz_readers.py"), "--seconds", "5", "--corpus", str(HERE / "corpus")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    executed = next(line for line in done.stderr.splitlines() if "number_of_executed_units" in line)
    assert int(executed.split()[-1]) > 50


@pytest.mark.usefixtures("loud_libraries_afterwards")
@pytest.mark.filterwarnings("ignore")  # of what libraries find in files that are wrong in every way
def test_random_bad_invocations_end_with_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # to be put back
    assert list(fuzz_commands.fuzz(tmp_path, seed=20, count=30, num_processes=1)) == []
