"""What tests of whole runs share."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def whole(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The result of a short run that nothing ends before its time, with full checkpoints."""
    from ended_runs import settings

    from leanvocab.finetune.job import finetune

    return finetune(base, data, tmp_path_factory.mktemp("whole") / "out", settings())
