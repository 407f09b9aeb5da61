"""Measurements that anyone can run: `python -m benchmarks NAME`. Each says what it measures, beside whom, and the limit."""

import sys
from pathlib import Path

# The accelerator of the tests, on which figures are counted where there is no GPU.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
