"""Fine-tune language models with only the vocabulary rows that the data uses, and get the whole model back.

Every name is imported on first use: `import leanvocab` alone loads neither torch nor numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from leanvocab.adapters.exporting import export_trainable_tokens
    from leanvocab.checkpoints.delta_loading import load_delta
    from leanvocab.checkpoints.delta_making import make_delta
    from leanvocab.checkpoints.delta_saving import save_delta
    from leanvocab.checkpoints.full_saving import save_full
    from leanvocab.checkpoints.merge import merge_checkpoint
    from leanvocab.errors import LeanVocabError
    from leanvocab.model.growing import extend_
    from leanvocab.model.shrink import merge_, partial_state_dicts, shrink_, shrunk
    from leanvocab.model.status import status
    from leanvocab.reports.memory import estimate_memory
    from leanvocab.texts.counting import count_tokens
    from leanvocab.trainers.callback import LeanVocabCallback
    from leanvocab.trainers.shrinking import shrink_trainer_
    from leanvocab.trimming.export import export_trimmed
    from leanvocab.vocabulary.counts import TokenCounts
    from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

_NAMES_BY_ROOM = {
    "errors": ("LeanVocabError",),
    "vocabulary.counts": ("TokenCounts",),
    "texts.counting": ("count_tokens",),
    "vocabulary.partial_vocabulary": ("PartialVocabulary",),
    "model.shrink": ("shrink_", "merge_", "shrunk", "partial_state_dicts"),
    "model.growing": ("extend_",),
    "model.status": ("status",),
    "reports.memory": ("estimate_memory",),
    "checkpoints.full_saving": ("save_full",),
    "checkpoints.delta_saving": ("save_delta",),
    "checkpoints.delta_loading": ("load_delta",),
    "checkpoints.delta_making": ("make_delta",),
    "checkpoints.merge": ("merge_checkpoint",),
    "adapters.exporting": ("export_trainable_tokens",),
    "trimming.export": ("export_trimmed",),
    "trainers.shrinking": ("shrink_trainer_",),
    "trainers.callback": ("LeanVocabCallback",),
}
_ROOMS = {name: room for room, names in _NAMES_BY_ROOM.items() for name in names}

__all__ = [  # noqa: RUF022 (the order of the flow)
    "LeanVocabError",
    "TokenCounts",
    "count_tokens",
    "PartialVocabulary",
    "shrink_",
    "extend_",
    "merge_",
    "shrunk",
    "status",
    "partial_state_dicts",
    "estimate_memory",
    "save_full",
    "save_delta",
    "load_delta",
    "make_delta",
    "merge_checkpoint",
    "export_trainable_tokens",
    "export_trimmed",
    "shrink_trainer_",
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
