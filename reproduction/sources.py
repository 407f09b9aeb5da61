"""Sources of data, tokenizers, configs and models: the hub, or folders; and what is missing there.

A folder of data holds `glue/TASK.SPLIT.parquet` and `xnli/xnli.LANGUAGE.SPLIT.parquet`, and `…_partial.parquet` where only
some rows of a split are at hand; a folder of tokenizers or models holds one folder a name.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanvocab.errors import DataError, LeanVocabError, ModelError, first_line
from reproduction.paper import XNLI_ROWS, Paper, Task

if TYPE_CHECKING:
    from datasets import Dataset

OWN_CONFIGS = Path(__file__).parent / "configs"
"""Published configs of checkpoints whose weights and tokenizers are not needed: small files of this project."""
HUB_NAMES = {"glue": "nyu-mll/glue", "xnli": "facebook/xnli"}
_FILLER_RATIO = 0.01  # rows that a model may have beyond its tokenizer's pieces: DeBERTaV3 has 99 of 128,100


class NotHereError(LeanVocabError):
    """Something that a folder lacks. Its cells stay undecided."""


@dataclass(frozen=True)
class Split:
    """A split as it is at hand."""

    name: str
    rows: "Dataset"
    is_partial: bool


@dataclass(frozen=True)
class TextData:
    """The texts of a task or of a language: the splits at hand, and what is missing of them, in words."""

    name: str
    text_columns: tuple[str, ...]
    splits: tuple[Split, ...]
    gaps: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        return not self.gaps

    @property
    def num_rows(self) -> int:
        return sum(len(split.rows) for split in self.splits)


@dataclass
class Sources:
    """The hub where a folder is None; otherwise that folder alone."""

    data: Path | None = None
    tokenizers: Path | None = None
    models: Path | None = None
    paper: Paper = field(default_factory=Paper)
    _tokenizers: dict[str, Any] = field(default_factory=dict)
    _texts: dict[str, TextData] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option, folder in (("--data", self.data), ("--tokenizers", self.tokenizers), ("--models", self.models)):
            if folder is not None and not folder.is_dir():
                raise DataError(f"the folder {folder} ({option}) does not exist")

    # ------------------------------------------------------------------------------------------------- text

    def glue(self, task: Task) -> TextData:
        """All splits of a GLUE task that are at hand."""
        if task.name not in self._texts:
            counts = self.paper.num_examples[task.name]
            found = self._find("glue", task.name, task.name, [split for split, _ in task.splits])
            gaps = []
            for heading in dict.fromkeys(heading for _, heading in task.splits):
                names = [split for split, under in task.splits if under == heading]
                gaps += _gaps(names, found, counts[heading], task.name)
            gaps = gaps if found else [f"{task.name} is not at hand"]
            data = TextData(task.name, task.text_columns, tuple(found.values()), tuple(gaps))
            self._texts[task.name] = data
        return self._texts[task.name]

    def xnli(self, language: str) -> TextData:
        """All splits of a language of XNLI that are at hand."""
        name = f"xnli.{language}"
        if name not in self._texts:
            found = self._find("xnli", name, language, list(XNLI_ROWS))
            gaps = [gap for split, rows in XNLI_ROWS.items() for gap in _gaps([split], found, rows, name)]
            self._texts[name] = TextData(name, ("premise", "hypothesis"), tuple(found.values()), tuple(gaps))
        return self._texts[name]

    def require(self, task: Task) -> TextData:
        """A task that the user asked for by name: an error where there is nothing of it.

        Raises:
            DataError: the folder has no file of the task.
        """
        found = self.glue(task)
        if not found.splits:
            first = task.splits[0][0]
            raise DataError(
                f"{self.data} holds no file of the task {task.name!r}; expected glue/{task.name}.{first}.parquet and so on"
            )
        return found

    def _find(self, benchmark: str, prefix: str, config_name: str, splits: list[str]) -> dict[str, Split]:
        from leanvocab.texts.data_files import load_splits, read_data_file

        if self.data is None:
            loaded = load_splits(HUB_NAMES[benchmark], config_name)
            return {name: Split(name, loaded[name], False) for name in splits if name in loaded}
        folder = self.data / benchmark
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}; expected Parquet files such as {prefix}.{splits[0]}.parquet")
        found = {}
        for name in splits:
            whole, part = folder / f"{prefix}.{name}.parquet", folder / f"{prefix}.{name}_partial.parquet"
            if whole.is_file() or part.is_file():
                path = whole if whole.is_file() else part
                found[name] = Split(name, read_data_file(path), path == part)
        return found

    # --------------------------------------------------------------------------------- tokenizers and configs

    def tokenizer(self, name: str) -> Any:
        """The tokenizer of a name on the hub, or of the folder of the same last name.

        Raises:
            NotHereError: the folder lacks it.
            ModelError: it cannot be read.
        """
        if name not in self._tokenizers:
            from transformers import AutoTokenizer

            try:
                self._tokenizers[name] = AutoTokenizer.from_pretrained(self._path("tokenizer", name, self.tokenizers))
            except (OSError, ValueError, KeyError) as error:
                raise ModelError(f"the tokenizer {name!r} cannot be loaded: {first_line(error)}") from error
        return self._tokenizers[name]

    def config(self, checkpoint: str) -> Any:
        """The config of a checkpoint: beside the tokenizers, among the project's own, or on the hub.

        Raises:
            NotHereError: it is in neither folder.
            ModelError: it cannot be read.
        """
        from transformers import AutoConfig

        short = checkpoint.rpartition("/")[2]
        beside = None if self.tokenizers is None else self.tokenizers / short / "config.json"
        own = OWN_CONFIGS / f"{short}.json"
        try:
            if beside is not None and beside.is_file():
                return AutoConfig.from_pretrained(beside.parent)
            if own.is_file():
                settings = json.loads(own.read_text())
                return AutoConfig.for_model(**settings)
            return AutoConfig.from_pretrained(self._path("config", checkpoint, self.tokenizers))
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"the config of {checkpoint!r} cannot be loaded: {first_line(error)}") from error

    def model(self, name: str) -> str:
        """Path of a pretrained model: a folder, or its name on the hub."""
        return str(self._path("model", name, self.models))

    def local_models(self) -> list[str]:
        """The models in the folder of models."""
        folders = [] if self.models is None else sorted(self.models.iterdir())
        return [folder.name for folder in folders if (folder / "config.json").is_file()]

    def _path(self, what: str, name: str, folder: Path | None) -> Path | str:
        if folder is None:
            return name
        found = folder / name.rpartition("/")[2]
        if not found.is_dir():
            raise NotHereError(f"the {what} {found.name} is not in the folder of {what}s")
        return found


def check_tokenizer(name: str, tokenizer: Any, checkpoint: str, config: Any) -> None:
    """A tokenizer and a config belong together: about as many pieces as rows, the same special ids.

    Raises:
        ModelError: they do not.
    """
    problem = None
    pieces, rows = len(tokenizer), config.vocab_size
    if pieces > rows or pieces < rows * (1 - _FILLER_RATIO):
        problem = f"it has {pieces:,} pieces, the config {rows:,} rows"
    for special in ("pad_token_id", "bos_token_id", "eos_token_id"):
        here, there = getattr(tokenizer, special, None), getattr(config, special, None)
        if problem is None and here is not None and there is not None and here != there:
            problem = f"its {special} is {here}, the config's {there}"
    if problem:
        raise ModelError(f"the tokenizer {name!r} does not match the config of {checkpoint!r}: {problem}")


def _gaps(names: list[str], found: dict[str, Split], expected_rows: int, prefix: str) -> list[str]:
    """Missing parts of the splits that one number of rows stands for; in words that name the splits."""
    absent = [name for name in names if name not in found]
    partial = [found[name] for name in names if name in found and found[name].is_partial]
    gaps = [f"{prefix}.{name} is not at hand" for name in absent]
    gaps += [f"{prefix}.{split.name} is partial: {len(split.rows):,} of {expected_rows:,} rows" for split in partial]
    num_rows = sum(len(found[name].rows) for name in names if name in found)
    if not gaps and num_rows != expected_rows:
        gaps = [f"{prefix}.{' and '.join(names)} has {num_rows:,} rows, the paper's {expected_rows:,}"]
    return gaps
