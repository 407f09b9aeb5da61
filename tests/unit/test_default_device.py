"""Suites that were written for a CPU pass with a device as torch's default device (see `default_device`)."""

import os
import subprocess
import sys
from pathlib import Path

import accelerator
import pytest

SLOW = (
    "test_partial_module",
    "test_shrink",
    "test_output_layer",
    "test_lazy_logits",
    "test_optimizer_steps",
    "test_full_saving",
)
SUITES = ["test_missing", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_passes_on_the_device(suite: str, repository: Path) -> None:
    if not accelerator.can_be_emulated():
        pytest.skip("torch can emulate a device from 2.13 on")
    paths = [str(repository / "tests" / "support"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "default_device",
            "-p",
            "no:cacheprovider",
            f"tests/unit/{suite}.py",
        ],
        cwd=repository,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, done.stdout[-5000:]
