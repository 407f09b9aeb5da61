"""Fine-tune language models with only the vocabulary rows that the data uses, and get the whole model back.

Every name is imported on first use: `import leanvocab` alone loads neither torch nor numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from leanvocab._version import __version__

if TYPE_CHECKING:
    from leanvocab.checkpoints.delta_loading import load_delta
    from leanvocab.checkpoints.delta_saving import save_delta
    from leanvocab.checkpoints.full_saving import save_full
    from leanvocab.checkpoints.merge import merge_checkpoint
    from leanvocab.errors import LeanVocabError
    from leanvocab.model.shrink import merge_, partial_state_dicts, shrink_, shrunk
    from leanvocab.model.status import status
    from leanvocab.reports.memory import estimate_memory
    from leanvocab.trainer import LeanVocabCallback
    from leanvocab.vocabulary.counts import TokenCounts, count_tokens
    from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

# Name → room, in the order in which the data flows.
_ROOMS = {
    "LeanVocabError": "errors",
    "TokenCounts": "vocabulary.counts",
    "count_tokens": "vocabulary.counts",
    "PartialVocabulary": "vocabulary.partial_vocabulary",
    "shrink_": "model.shrink",
    "merge_": "model.shrink",
    "shrunk": "model.shrink",
    "status": "model.status",
    "partial_state_dicts": "model.shrink",
    "estimate_memory": "reports.memory",
    "save_full": "checkpoints.full_saving",
    "save_delta": "checkpoints.delta_saving",
    "load_delta": "checkpoints.delta_loading",
    "merge_checkpoint": "checkpoints.merge",
    "LeanVocabCallback": "trainer",
}

__all__ = [  # noqa: RUF022 (the order of the flow)
    "LeanVocabError",
    "TokenCounts",
    "count_tokens",
    "PartialVocabulary",
    "shrink_",
    "merge_",
    "shrunk",
    "status",
    "partial_state_dicts",
    "estimate_memory",
    "save_full",
    "save_delta",
    "load_delta",
    "merge_checkpoint",
    "LeanVocabCallback",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'leanvocab' has no attribute {name!r}")
    value = getattr(import_module(f"leanvocab.{_ROOMS[name]}"), name)
    globals()[name] = value  # the next access is an ordinary lookup
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
