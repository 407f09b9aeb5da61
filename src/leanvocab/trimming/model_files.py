"""The side of the model: which ids it needs, its config files with new ids, and its tensors of the vocabulary's size."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvocab.errors import CheckpointError, ModelError, VocabularyError
from leanvocab.files.presence import is_entry
from leanvocab.files.untrusted_files import read_json
from leanvocab.trimming.computed_ids import ids_computed_with, reads_last_row, refuse_what_computes, timestamps
from leanvocab.trimming.id_fields import NewIds, needed_ids, renumbered
from leanvocab.trimming.model_configs import (
    CONFIG,
    empty_model,
    ids_named,
    numbers_in,
    read_config,
    text_size,
    trimmed_config,
    with_defaults,
)
from leanvocab.trimming.vocabulary_tensors import TrimmedTensor, trimmed_tensors
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary
from leanvocab.vocabulary.special_ids import ID_OVER_OTHERS, ids_looked_up_elsewhere, model_full_size

_GENERATION = "generation_config.json"
# Files that may hold ids of tokens, beside those of tokenizers.
_ID_FILES = (
    CONFIG,
    _GENERATION,
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "audio_preprocessor_config.json",
    "feature_extractor_config.json",
)


@dataclass(frozen=True)
class ModelFiles:
    """The configs of a folder, by file name, as they lie there."""

    configs: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, folder: Path, config: Mapping[str, Any] | None = None) -> "ModelFiles":
        """Those in `folder`; `config` takes the place of its config.json.

        Raises `CheckpointError` where they cannot be read, and `ModelError` that names a model which cannot be trimmed.
        """
        if not is_entry(folder / CONFIG):
            raise CheckpointError(f"{folder}: expected {CONFIG}, found none")
        configs = {name: read_json(folder, name, infinity=True)[1] for name in _ID_FILES if is_entry(folder / name)}
        files = cls(configs if config is None else configs | {CONFIG: config})
        refuse_what_computes(files._config)
        files.reasons  # noqa: B018  read whole before long work
        return files

    @cached_property
    def _config(self) -> dict[str, Any]:
        return with_defaults(self.configs[CONFIG])

    @cached_property
    def _model(self) -> Any:
        return empty_model(self.configs[CONFIG])

    @cached_property
    def text_size(self) -> int:
        """The `vocab_size` of the config, or of its part that reads text."""
        return text_size(read_config(self.configs[CONFIG]), model_full_size(self._model))

    @cached_property
    def full_size(self) -> int:
        """Rows of the table that takes the model's ids; a few more than `text_size` in some models."""
        return model_full_size(self._model) or self.text_size

    @cached_property
    def reasons(self) -> dict[str, set[int]]:
        """Why ids have to stay, and which: those that configs insert, and those that the model computes with."""
        of_configs = {
            f"{file} inserts them, or compares with them": needed_ids(self._with_defaults(file), file, self.text_size)
            for file in self.configs
        }
        computed = ids_computed_with(self._model, self.text_size, self.full_size)
        further = {
            "generation computes times with them": timestamps(self.configs.get(_GENERATION, {}), self.full_size),
            "it is looked up for placeholders": {ID_OVER_OTHERS} if ids_looked_up_elsewhere(self._config) else set(),
        }
        return of_configs | computed | {reason: ids for reason, ids in further.items() if ids}

    def required_ids(self) -> NDArray[np.int64]:
        """The ids below `full_size` that have to stay, ascending."""
        ids = set().union(*self.reasons.values())
        return np.array(sorted(token_id for token_id in ids if token_id < self.full_size), dtype=np.int64)

    def new_ids(self, vocabulary: PartialVocabulary, pad_to_multiple_of: int | None = None) -> NewIds:
        """What ids become; `vocabulary` is of all ids, those of a tokenizer too that the model has no row for.

        Raises `VocabularyError` where it is of fewer than the model has rows, or lacks an id that has to stay.
        """
        if vocabulary.full_size < self.full_size:
            raise VocabularyError(
                f"the vocabulary is of {vocabulary.full_size:,} ids, and the model has {self.full_size:,} rows: they belong "
                "to different models"
            )
        for reason, ids in self.reasons.items():
            for token_id in sorted(token_id for token_id in ids if token_id < self.full_size):
                if token_id not in vocabulary:
                    raise VocabularyError(f"{vocabulary.describe(token_id)} is not kept, and has to be: {reason}")
        kept = len(vocabulary.below(self.text_size))
        return NewIds(vocabulary, self.text_size, self._padding(kept, pad_to_multiple_of))

    def _padding(self, kept: int, multiple: int | None) -> int:
        if multiple is not None and multiple < 1:
            raise VocabularyError(f"expected pad_to_multiple_of of 1 or more, or None, got {multiple!r}")
        padding = 0 if multiple is None or kept == self.text_size else -kept % multiple
        if padding and kept + padding >= self.text_size:
            raise VocabularyError(
                f"{kept:,} kept rows, padded to a multiple of {multiple}, are no fewer than the {self.text_size:,} that there "
                "were; leave pad_to_multiple_of out"
            )
        if padding and (self.full_size > self.text_size or reads_last_row(self._model)):
            raise ModelError(
                f"{type(self._model).__name__} computes with ids behind its vocabulary, which padding rows would move; leave "
                "pad_to_multiple_of out"
            )
        return padding

    def padding_id(self, vocabulary: PartialVocabulary) -> int:
        """The id whose row fills the end: of the pad token, else of the end of a sequence, else the first; always a kept one."""
        for name in ("pad_token_id", "eos_token_id"):
            for token_id in ids_named(self.configs[CONFIG], name):
                if token_id in vocabulary and token_id < self.full_size:
                    return token_id
        return int(vocabulary.token_ids[0])

    def written(self, new_ids: NewIds) -> dict[str, bytes]:
        """File name → content, of every config with new ids; raises `CheckpointError` for a field that is not understood."""
        return {
            file: (json.dumps(self._renumbered(file, new_ids), indent=2, ensure_ascii=False) + "\n").encode()
            for file in self.configs
        }

    def trimmed_tensors(self, shapes: Mapping[str, tuple[int, ...]], new_ids: NewIds) -> dict[str, TrimmedTensor]:
        """Tensor in the checkpoint → what becomes of it, for those of the vocabulary's size; `shapes` are of them all."""
        if new_ids.size(self.full_size) == self.full_size:
            return {}  # all ids are kept
        config = self._renumbered(CONFIG, new_ids)
        sizes = {self.text_size, self.full_size}
        # What has one of these sizes in the trimmed config as well is of something else.
        others = sizes & numbers_in(with_defaults(config))
        return trimmed_tensors(self._model, empty_model(config), shapes, new_ids, sizes, others)

    def _with_defaults(self, file: str) -> Mapping[str, Any]:
        return self._config if file == CONFIG else self.configs[file]

    def _renumbered(self, file: str, new_ids: NewIds) -> dict[str, Any]:
        if file == CONFIG:
            return trimmed_config(self.configs[file], new_ids)
        return renumbered(self.configs[file], file, new_ids)
