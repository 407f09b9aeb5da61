"""Files of a tokenizer with some of its tokens, under new ids in the old order: they load as the same class, and split as it did.

Each file is rewritten as it is, so that nothing else in it changes, whoever reads it. The tokenizer that transformers makes of
them, which need not be what tokenizer.json says, is compared with the trimmed one of before, part by part, before anything is
handed out. No torch.
"""

import io
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from leanvocab.errors import VocabularyError, first_line, shortened
from leanvocab.files.copying import read_exactly
from leanvocab.files.presence import is_folder
from leanvocab.files.untrusted_files import opened, parse_object
from leanvocab.trimming.sentencepiece_files import own_pieces, trimmed_pieces
from leanvocab.trimming.splits import check_model, closed_tokens, merged, vocabulary_of
from leanvocab.trimming.tokenizer_json import inserted_ids, trimmed_state
from leanvocab.vocabulary.special_ids import tokenizer_ids

_CONFIG = "config.json"  # names the class where the tokenizer's own file does not
_STATE_NAME = re.compile(r"tokenizer(\.\d[\d.]*)?\.json")
_MAPS = ("vocab.json", "added_tokens.json")
_WITHOUT_IDS = ("special_tokens_map.json", "chat_template.jinja", "chat_template.json", "normalizer.json")
_SPLITTING = ("added_tokens", "normalizer", "pre_tokenizer", "model")
_MODELS = (".model", ".spm")
_NAMES = re.compile(
    rf"{_STATE_NAME.pattern}|tokenizer_config\.json|vocab\.txt|merges\.txt|tekken\.json|.*\.(model|spm|tiktoken)"
    rf"|{'|'.join(map(re.escape, (*_MAPS, *_WITHOUT_IDS)))}"
)
_ID_FIELD = re.compile(r"(^|_)(ids?|index|idx)$")
_NO_ID_FIELD = re.compile(r"type_ids?$|^extra_ids$|^name_or_path$")


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer in files, read once.

    Attributes:
        name: the folder, or the class of a tokenizer in memory, for messages.
        names: the tokenizer's files, among them those that `written` leaves out.
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
        _state_of(source, name)
        with tempfile.TemporaryDirectory() as folder:
            source.save_pretrained(folder)
            read = cls._of_folder(Path(folder), name)
        saved = {part: value for part, value in read._state.items() if part in _SPLITTING}
        if part := _first_difference(saved, _state_of(source, name)):
            raise VocabularyError(f"{name}: saved and loaded anew it is another tokenizer: its part {part!r} differs")
        return read

    @classmethod
    def _of_folder(cls, folder: Path, name: str) -> Self:
        names = sorted(entry for entry in os.listdir(folder) if _NAMES.fullmatch(entry))
        files = {entry: _content(folder, entry) for entry in names}
        config = _content(folder, _CONFIG) if _CONFIG in os.listdir(folder) else None
        read = cls(name, files, config, _load(folder, name))
        try:
            check_model(read._state["model"])
            read._check_sources()
            for state in (read._state, *read._raw_states.values()):
                inserted_ids(state)
                read._check_ids(state)
        except VocabularyError as error:
            raise VocabularyError(f"the tokenizer of {name} cannot be trimmed: {error}") from None
        return read

    @cached_property
    def _left_out(self) -> list[str]:
        """Files that can be read, and not written."""
        return [
            name
            for name in self._files
            if name.endswith((*_MODELS, ".tiktoken", "tekken.json")) and name not in self._own_pieces
        ]

    @property
    def names(self) -> frozenset[str]:
        """Names of the files that are the tokenizer's."""
        return frozenset(self._files)

    def closed(self, ids: Iterable[int] | NDArray[Any]) -> NDArray[np.int64]:
        """Ids that stay so that text of `ids` splits as it did: these, every added and special token, and what decides a split.

        Ascending, and closed itself. Ids for which there is no token are among them, as they came.
        """
        wanted = set(np.asarray(list(ids), dtype=np.int64).tolist()) | self._always
        model = self._state["model"]
        tokens = {token for token, token_id in self._model_vocab.items() if token_id in wanted}
        closed = closed_tokens(model, tokens, byte_level=_has_part(self._state, "ByteLevel"))
        if isinstance(model["vocab"], Mapping):
            wanted |= {self._model_vocab[token] for token in closed}
        else:  # a piece may stand there twice
            wanted |= {place for place, entry in enumerate(model["vocab"]) if entry[0] in closed}
        return np.array(sorted(wanted), dtype=np.int64)

    def written(self, ids: NDArray[Any]) -> dict[str, bytes]:
        """File names → contents of the tokenizer with these tokens alone, whose new ids are their positions in `ids`.

        Files of tiktoken and Mistral are left out where a tokenizer.json stands beside them.

        Raises:
            VocabularyError: the ids are not closed, or the files would not load as the tokenizer that they have to be.
        """
        closed = self.closed(ids)
        if not np.array_equal(closed, ids):
            lacking = np.setdiff1d(closed, ids)
            raise VocabularyError(
                f"the tokenizer of {self.name} needs further ids for these ({shortened(lacking[:5].tolist())}), "
                "or they are not ascending: expected what closed(ids) gives"
            )
        new_ids = {int(token_id): new for new, token_id in enumerate(closed)}
        try:
            contents = ((name, self._trimmed_file(name, content, new_ids)) for name, content in self._files.items())
            files = {name: content for name, content in contents if content is not None}
            self._check_loaded(files, new_ids)
        except VocabularyError as error:
            raise VocabularyError(f"the tokenizer of {self.name} cannot be trimmed: {error}") from None
        return files

    @cached_property
    def _state(self) -> dict[str, Any]:
        """The tokenizer that transformers makes of the files, as tokenizer.json has it."""
        return _state_of(self._loaded, self.name)

    @cached_property
    def _vocab(self) -> dict[str, int]:
        """Tokens → ids, added ones among them."""
        return dict(self._loaded.get_vocab())

    @cached_property
    def _model_vocab(self) -> dict[str, int]:
        return vocabulary_of(self._state["model"])

    @cached_property
    def _raw_states(self) -> dict[str, dict[str, Any]]:
        """Files of the kind of tokenizer.json → contents; older ones leave the type of the model out."""
        return {
            name: parse_object(Path(self.name, name), content)
            for name, content in self._files.items()
            if _STATE_NAME.fullmatch(name)
        }

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

    def _check_sources(self) -> None:
        written = [name for name in self._files if name not in self._left_out]
        if self._left_out and not any(_STATE_NAME.fullmatch(name) for name in written):
            raise VocabularyError(
                f"{self._left_out[0]} can be read, and not written; load it and save it with save_pretrained first"
            )

    def _check_ids(self, state: Mapping[str, Any]) -> None:
        added = {token["content"]: token["id"] for token in state.get("added_tokens") or ()}
        for token, token_id in (*vocabulary_of(state["model"]).items(), *added.items()):
            if self._vocab.get(token) != token_id:
                raise VocabularyError(
                    f"in its file {token!r} has the id {token_id}, and in {type(self._loaded).__name__}, "
                    f"which is made of it, {self._vocab.get(token)}"
                )

    def _trimmed_file(self, name: str, content: bytes, new_ids: Mapping[int, int]) -> bytes | None:
        """The new content of a file; None: it is left out."""
        if name in _WITHOUT_IDS:
            return content
        if _STATE_NAME.fullmatch(name):
            return _as_json(trimmed_state(self._raw_states[name], self._state["model"]["type"], new_ids))
        if name in _MAPS:
            return _as_json(
                _trimmed_map(parse_object(Path(self.name, name), content), self._vocab, new_ids), indent=None
            )
        if name == "vocab.txt":
            lines = _lines(content)
            return "".join(line for place, line in enumerate(lines) if place in new_ids).encode()
        if name == "merges.txt":
            return "".join(self._trimmed_merges(content, new_ids)).encode()
        if name == "tokenizer_config.json":
            return self._trimmed_config(content, new_ids)
        if name in self._own_pieces:
            return trimmed_pieces(content, lambda piece: self._vocab.get(piece) in new_ids)
        return None

    def _trimmed_merges(self, content: bytes, new_ids: Mapping[int, int]) -> Iterator[str]:
        for line in _lines(content):
            match line.rstrip("\n").split(" "):
                case [left, right] if not line.startswith("#version"):
                    made = (left, right, merged(self._state["model"], left, right))
                    if all(self._model_vocab.get(token) in new_ids for token in made):
                        yield line
                case _:
                    yield line

    def _trimmed_config(self, content: bytes, new_ids: Mapping[int, int]) -> bytes:
        config = parse_object(Path(self.name, "tokenizer_config.json"), content)
        trimmed = dict(config)
        if "added_tokens_decoder" in config:
            added = {self._vocab[token["content"]]: token for token in config["added_tokens_decoder"].values()}
            trimmed["added_tokens_decoder"] = {str(new_ids[old]): token for old, token in added.items()}
        for name, value in config.items():
            if _ID_FIELD.search(name) and not _NO_ID_FIELD.search(name) and value is not None:
                values = value if isinstance(value, list) else [value]
                if not all(type(token_id) is int and token_id in new_ids for token_id in values):
                    raise VocabularyError(f"{name} in tokenizer_config.json seems to hold ids: {shortened(value)}")
                renumbered = [new_ids[token_id] for token_id in values]
                trimmed[name] = renumbered if isinstance(value, list) else renumbered[0]
        return content if trimmed == config else _as_json(trimmed)

    def _check_loaded(self, files: Mapping[str, bytes], new_ids: Mapping[int, int]) -> None:
        """Raises `VocabularyError` where the files make another tokenizer than the one of before with fewer tokens."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items() if self._config is None else (*files.items(), (_CONFIG, self._config)):
                Path(folder, name).write_bytes(content)
            loaded = _load(Path(folder), f"the trimmed {self.name}")
        vocab = {token: new_ids[token_id] for token, token_id in self._vocab.items() if token_id in new_ids}
        expected = trimmed_state(self._state, self._state["model"]["type"], new_ids)
        for what, before, after in (
            ("class", type(self._loaded).__name__, type(loaded).__name__),
            ("ids", vocab, loaded.get_vocab()),
            ("special tokens", self._loaded.special_tokens_map, loaded.special_tokens_map),
        ):
            if before != after:
                raise VocabularyError(f"with fewer tokens its {what} would differ: {_difference(before, after)}")
        if part := _first_difference(expected, _state_of(loaded, self.name)):
            raise VocabularyError(f"with fewer tokens its part {part!r} would differ")


def is_tokenizer_file(name: str) -> bool:
    """True for the name of a file of a tokenizer, or beside it, at the top of a folder."""
    return _NAMES.fullmatch(name) is not None


def _load(folder: Path, name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # what lies in its files: readers raise whatever they meet
        raise VocabularyError(f"the tokenizer of {name} cannot be loaded: {first_line(error)}") from error


def _state_of(tokenizer: Any, name: str) -> dict[str, Any]:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "to_str"):
        raise VocabularyError(
            f"the tokenizer of {name} cannot be trimmed: {type(tokenizer).__name__} is not one of the tokenizers library's, "
            "so that what decides its splits is not known"
        )
    try:
        state: dict[str, Any] = json.loads(backend.to_str())
    except Exception as error:  # a part of it is made of Python code
        raise VocabularyError(f"the tokenizer of {name} cannot be trimmed: {first_line(error)}") from error
    return state


def _content(folder: Path, name: str) -> bytes:
    with opened(folder, name) as descriptor:
        return read_exactly(descriptor, 0, os.fstat(descriptor).st_size)


def _has_part(state: Mapping[str, Any], kind: str) -> bool:
    """True where the normalizer or the pre-tokenizer is of a kind, or has such a part."""
    parts = json.dumps([state.get("normalizer"), state.get("pre_tokenizer")])
    return f'"type": "{kind}"' in parts


def _first_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    return next((part for part in before if before[part] != after.get(part)), None)


def _difference(before: Any, after: Any) -> str:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        key = next(key for key in (*before, *after) if before.get(key) != after.get(key))
        return f"{key!r} {shortened(before.get(key))} → {shortened(after.get(key))}"
    return f"{shortened(before)} → {shortened(after)}"


def _trimmed_map(ids: Mapping[str, Any], vocab: Mapping[str, int], new_ids: Mapping[int, int]) -> dict[str, int]:
    for token, token_id in ids.items():
        if vocab.get(token) != token_id:
            raise VocabularyError(f"a file gives {token!r} the id {token_id}, the tokenizer has {vocab.get(token)}")
    return {token: new_ids[token_id] for token, token_id in ids.items() if token_id in new_ids}


def _lines(content: bytes) -> list[str]:
    """Lines with their ends, as they are read where a vocabulary is read."""
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").readlines()


def _as_json(value: Any, indent: int | None = 2) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=indent).encode()
