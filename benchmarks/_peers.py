"""Folders of the peers' code, where it is there. Nothing of theirs is part of this project."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

SMALLER_VOCAB = "transformer-smaller-training-vocab"
AUTHORS = "the authors' code"
NO_AUTHORS_CODE = (
    f"{AUTHORS}: open: not here; give --authors-code, a checkout of mlsw/partial-embedding-matrix-adaptation"
)
NO_SMALLER_VOCAB = (
    f"{SMALLER_VOCAB}: open: not here; it needs transformers < 5: give --smaller-vocab-python, the path of an "
    "interpreter that has both"
)
NO_GPU = "open: no GPU"


def authors_module(path: Path | str, name: str) -> Any:
    """A module of the authors' package (`data.token_counter`, `embedding_pruner`) from a checkout."""
    source = str(Path(path).resolve() / "src")
    if source not in sys.path:
        sys.path.append(source)
    return importlib.import_module(f"partial_embedding_matrix_adaptation.{name}")


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
