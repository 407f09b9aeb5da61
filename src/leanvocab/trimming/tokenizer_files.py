"""Files of a tokenizer with some of its tokens, under new ids in the old order: they load as the same class, and split as it did.

Each file is rewritten as it is, so that nothing else in it changes, whoever reads it. The tokenizer that transformers makes of
them, which need not be what tokenizer.json says, is compared with the trimmed one of before, part by part, before anything is
handed out. No torch.
"""

import json
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from leanvocab.errors import LeanVocabError, VocabularyError, first_line, shortened
from leanvocab.files.copying import read_exactly
from leanvocab.files.presence import is_folder
from leanvocab.files.untrusted_files import opened, parse_object
from leanvocab.trimming.splits import check_model, closed_tokens, vocabulary_of, words_that_split
from leanvocab.trimming.tokenizer_contents import (
    NewIds,
    as_json,
    inserted_ids,
    own_pieces,
    trimmed_config,
    trimmed_lines,
    trimmed_map,
    trimmed_merges,
    trimmed_pieces,
    trimmed_state,
)
from leanvocab.vocabulary.special_ids import tokenizer_ids

_CONFIG = "config.json"  # names the class where the tokenizer's own file does not
_STATE = re.compile(r"tokenizer(\.\d[\d.]*)?\.json")
_MAPS = ("vocab.json", "added_tokens.json")
_WITHOUT_IDS = ("special_tokens_map.json", "chat_template.jinja", "chat_template.json", "normalizer.json")
_MODELS = (".model", ".spm")
_NAMES = re.compile(
    rf"{_STATE.pattern}|tokenizer_config\.json|vocab\.txt|merges\.txt|tekken\.json|.*\.(model|spm|tiktoken)"
    rf"|{'|'.join(map(re.escape, (*_MAPS, *_WITHOUT_IDS)))}"
)


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer in files, read once.

    Attributes:
        name: the folder, or the class of a tokenizer in memory, for messages.
    """

    name: str
    _files: Mapping[str, bytes] = field(repr=False)
    _config: bytes | None = field(repr=False)
    _loaded: Any = field(repr=False)

    @classmethod
    def read(cls, source: Any) -> Self:
        """The tokenizer of a folder, or one of transformers in memory, as it would be saved.

        Raises:
            VocabularyError: it cannot be trimmed, and why.
            CheckpointError: a file is not readable, or not what its name says.
        """
        source = getattr(source, "tokenizer", source)  # a processor's
        if isinstance(source, str | os.PathLike):
            if not is_folder(source):
                raise VocabularyError(f"{os.fspath(source)}: expected a folder with a tokenizer's files, found none")
            return cls._of_folder(Path(source), os.fspath(source))
        name = type(source).__name__
        with _refusing(name):
            state = _state_of(source)
            with tempfile.TemporaryDirectory() as folder:
                source.save_pretrained(folder)
                read = cls._of_folder(Path(folder), name)
            if part := _first_difference(_splitting(read._state), _splitting(state)):
                raise VocabularyError(f"saved and loaded anew it is another one: its part {part!r} differs")
        return read

    @classmethod
    def _of_folder(cls, folder: Path, name: str) -> Self:
        names = sorted(entry for entry in os.listdir(folder) if is_tokenizer_file(entry))
        files = {entry: _content(folder, entry) for entry in names}
        config = _content(folder, _CONFIG) if _CONFIG in os.listdir(folder) else None
        with _refusing(name):
            read = cls(name, files, config, _load(files, config))
            check_model(read._state["model"])
            read._check_files()
        return read

    @property
    def names(self) -> frozenset[str]:
        """Names of the files that are the tokenizer's, among them those that `written` leaves out."""
        return frozenset(self._files)

    def closed(self, ids: Iterable[int] | NDArray[Any], texts: Collection[str] | None = None) -> NDArray[np.int64]:
        """Ids that stay so that text of `ids` splits as it did: these, every added and special token, and what decides a split.

        Ascending, and closed itself. Ids for which there is no token are among them, as they came.

        Args:
            ids: what is wanted.
            texts: only words of these that are unknown have to stay so. None: every word that is. That matters for a few
                WordPiece vocabularies alone, of which many more rows stay without texts.
        """
        wanted = set(np.asarray(list(ids), dtype=np.int64).tolist()) | self._always
        if wanted and min(wanted) < 0:
            raise VocabularyError(f"expected ids of tokens, got {min(wanted)}")
        closed = self._closed(wanted, None)
        if texts is None or self._state["model"]["type"] != "WordPiece":  # no other model's hang on unknown words
            return closed
        found = self._closed(wanted, set())
        if len(found) == len(closed):
            return closed
        words: set[str] = set()
        before = self._backend(None)
        while new := words_that_split(before, self._backend(found), texts) - words:
            words |= new
            found = self._closed(wanted, words)
        return found

    def written(self, ids: NDArray[Any]) -> dict[str, bytes]:
        """File names → contents of the tokenizer with these tokens alone, whose new ids are their positions in `ids`.

        Files of tiktoken and Mistral are left out where a tokenizer.json stands beside them.

        Raises:
            VocabularyError: the ids are not closed, or the files would not load as the tokenizer that they have to be.
        """
        closed = self._closed({*np.asarray(ids).tolist(), *self._always}, set())
        if not np.array_equal(closed, ids):
            lacking = np.setdiff1d(closed, ids)
            raise VocabularyError(
                f"the tokenizer of {self.name} needs further ids for these ({shortened(lacking[:5].tolist())}), "
                "or they are not ascending: expected what closed(ids) gives"
            )
        new_ids = _new_ids(closed)
        with _refusing(self.name):
            contents = ((name, self._trimmed_file(name, new_ids)) for name in self._files)
            files = {name: content for name, content in contents if content is not None}
            self._check_loaded(files, new_ids)
        return files

    @cached_property
    def _state(self) -> dict[str, Any]:
        """The tokenizer that transformers makes of the files, as tokenizer.json has it."""
        return _state_of(self._loaded)

    @cached_property
    def _vocab(self) -> dict[str, int]:
        """Tokens → ids, added ones among them."""
        return dict(self._loaded.get_vocab())

    @cached_property
    def _model_vocab(self) -> dict[str, int]:
        return vocabulary_of(self._state["model"])

    @cached_property
    def _raw_states(self) -> dict[str, dict[str, Any]]:
        """Files of the kind of tokenizer.json → contents."""
        return {name: self._object(name) for name in self._files if _STATE.fullmatch(name)}

    @cached_property
    def _always(self) -> set[int]:
        """Ids that stay whatever was wanted."""
        states = (self._state, *self._raw_states.values())
        own = {self._vocab[piece] for piece in chain(*self._own_pieces.values()) if piece in self._vocab}
        return tokenizer_ids(self._loaded).union(own, *map(inserted_ids, states))

    @cached_property
    def _own_pieces(self) -> dict[str, list[str]]:
        """Files of sentencepiece → pieces that they cannot be without; a file of another kind is none of them."""
        own = {}
        for name, content in self._files.items():
            if name.endswith(_MODELS):
                with suppress(VocabularyError, UnicodeDecodeError):
                    own[name] = own_pieces(content)
        return own

    @cached_property
    def _left_out(self) -> list[str]:
        """Files that can be read, and not written."""
        kinds = (*_MODELS, ".tiktoken", "tekken.json")
        return [name for name in self._files if name.endswith(kinds) and name not in self._own_pieces]

    def _object(self, name: str) -> dict[str, Any]:
        return parse_object(Path(self.name, name), self._files[name])

    def _closed(self, wanted: set[int], unknown_words: set[str] | None) -> NDArray[np.int64]:
        model = self._state["model"]
        tokens = {token for token, token_id in self._model_vocab.items() if token_id in wanted}
        byte_level = _has_part(self._state, "ByteLevel")
        closed = closed_tokens(model, tokens, byte_level=byte_level, unknown_words=unknown_words)
        if isinstance(model["vocab"], Mapping):
            stay = {self._model_vocab[token] for token in closed}
        else:  # a piece may stand there twice
            stay = {place for place, entry in enumerate(model["vocab"]) if entry[0] in closed}
        return np.array(sorted(wanted | stay), dtype=np.int64)

    def _backend(self, ids: NDArray[np.int64] | None) -> Any:
        """The tokenizer with these ids alone, or with all, which cuts and pads nothing."""
        from tokenizers import Tokenizer

        kind = self._state["model"]["type"]
        state = self._state if ids is None else trimmed_state(self._state, kind, _new_ids(ids))
        return Tokenizer.from_str(json.dumps(state | {"truncation": None, "padding": None}))

    def _check_files(self) -> None:
        """Raises `VocabularyError` where files contradict each other, or hold ids that are not understood."""
        if self._left_out and not self._raw_states:
            raise VocabularyError(
                f"{self._left_out[0]} can be read, and not written; load it and save it with save_pretrained first"
            )
        ids = set(self._vocab.values())
        for state in (self._state, *self._raw_states.values()):
            if beyond := inserted_ids(state) - ids:
                raise VocabularyError(f"id {min(beyond)} is put around text or pads it, and there is no such token")
            added = {token["content"]: token["id"] for token in state.get("added_tokens") or ()}
            for token, token_id in (*vocabulary_of(state["model"]).items(), *added.items()):
                if self._vocab.get(token) != token_id:
                    raise VocabularyError(
                        f"in its file {token!r} has the id {token_id}, and in {type(self._loaded).__name__}, "
                        f"which is made of it, {self._vocab.get(token)}"
                    )
        unchanged = {token_id: token_id for token_id in ids}
        for name in self._files.keys() - self._raw_states.keys():
            self._trimmed_file(name, unchanged)

    def _trimmed_file(self, name: str, new_ids: NewIds) -> bytes | None:
        """The new content of a file; None: it is left out."""
        content, vocab, model = self._files[name], self._vocab, self._state["model"]
        if name in self._own_pieces:
            return trimmed_pieces(content, lambda piece: vocab.get(piece) in new_ids)
        if name in self._raw_states:
            return as_json(trimmed_state(self._raw_states[name], model["type"], new_ids))
        if name in _MAPS:
            return as_json(trimmed_map(name, self._object(name), vocab, new_ids), indent=None)
        if name == "vocab.txt":
            return trimmed_lines(name, content, vocab, new_ids)
        if name == "merges.txt":
            return trimmed_merges(content, model, vocab, new_ids)
        if name == "tokenizer_config.json":
            config = self._object(name)
            trimmed = trimmed_config(config, vocab, new_ids)
            return content if trimmed == config else as_json(trimmed)
        return None if name in self._left_out else content

    def _check_loaded(self, files: Mapping[str, bytes], new_ids: NewIds) -> None:
        """Raises `VocabularyError` where the files make another tokenizer than the one of before with fewer tokens."""
        loaded = _load(files, self._config)
        vocab = {token: new_ids[token_id] for token, token_id in self._vocab.items() if token_id in new_ids}
        expected = trimmed_state(self._state, self._state["model"]["type"], new_ids)
        for what, before, after in (
            ("class", type(self._loaded).__name__, type(loaded).__name__),
            ("ids", vocab, loaded.get_vocab()),
            ("special tokens", self._loaded.special_tokens_map, loaded.special_tokens_map),
        ):
            if before != after:
                raise VocabularyError(f"with fewer tokens its {what} would differ: {_difference(before, after)}")
        if part := _first_difference(expected, _state_of(loaded)):
            raise VocabularyError(f"with fewer tokens its part {part!r} would differ")


def is_tokenizer_file(name: str) -> bool:
    """True for the name of a file of a tokenizer, or beside it, at the top of a folder."""
    return _NAMES.fullmatch(name) is not None


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Names the tokenizer in errors, be it of files that nobody vouches for."""
    said = f"the tokenizer of {name} cannot be trimmed: "
    try:
        yield
    except VocabularyError as error:
        raise error if str(error).startswith(said) else VocabularyError(f"{said}{error}") from None
    except LeanVocabError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise VocabularyError(
            f"{said}its files hold something else than expected ({type(error).__name__}: {first_line(error)})"
        ) from error


def _load(files: Mapping[str, bytes], config: bytes | None) -> Any:
    """The tokenizer that transformers makes of files.

    Older ones guess a model from the folder's name where there is no config; an empty one is handed over then.
    """
    from transformers import AutoTokenizer, PreTrainedConfig

    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items() if config is None else (*files.items(), (_CONFIG, config)):
            Path(folder, name).write_bytes(content)
        try:
            return AutoTokenizer.from_pretrained(
                folder,
                config=PreTrainedConfig() if config is None else None,
                trust_remote_code=False,
                local_files_only=True,
            )
        except Exception as error:  # what lies in its files: readers raise whatever they meet
            raise VocabularyError(f"it cannot be loaded ({first_line(error)})") from error


def _state_of(tokenizer: Any) -> dict[str, Any]:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "to_str"):
        raise VocabularyError(
            f"{type(tokenizer).__name__} is not one of the tokenizers library's, so that what decides its splits is not known"
        )
    try:
        state: dict[str, Any] = json.loads(backend.to_str())
    except Exception as error:  # a part of it is made of Python code
        raise VocabularyError(f"a part of it is in no file ({first_line(error)})") from error
    return state


def _content(folder: Path, name: str) -> bytes:
    with opened(folder, name) as descriptor:
        return read_exactly(descriptor, 0, os.fstat(descriptor).st_size)


def _new_ids(ids: NDArray[np.int64]) -> dict[int, int]:
    return {token_id: new for new, token_id in enumerate(ids.tolist())}


def _has_part(state: Mapping[str, Any], kind: str) -> bool:
    """True where the normalizer or the pre-tokenizer is of a kind, or has such a part."""
    parts = json.dumps([state.get("normalizer"), state.get("pre_tokenizer")])
    return f'"type": "{kind}"' in parts


def _splitting(state: Mapping[str, Any]) -> dict[str, Any]:
    """Parts that decide a split; that transformers calls further tokens special when it saves them does not."""
    added = [token | {"special": None} for token in state["added_tokens"]]
    return {part: state[part] for part in ("normalizer", "pre_tokenizer", "model")} | {"added_tokens": added}


def _first_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    return next((part for part in before if before[part] != after.get(part)), None)


def _difference(before: Any, after: Any) -> str:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        key = next(key for key in (*before, *after) if before.get(key) != after.get(key))
        return f"{key!r} {shortened(before.get(key))} → {shortened(after.get(key))}"
    return f"{shortened(before)} → {shortened(after)}"
