"""Doors: every trainer and every memory saver that people use, run with leanvocab and without, and compared.

`python -m doors` runs the combinations and writes docs/composability.md from what it measured.
"""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parents[1] / "tests" / "support")
)  # whose tiny models doors share, in every process
