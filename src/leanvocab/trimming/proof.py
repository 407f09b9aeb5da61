"""Proof of a trim: covered texts give the same tokens and the same bits; and how other texts are split now, in words.

A text is covered if every token that the full tokenizer makes of it was kept. Nothing that was written is trusted: tokenizers and
models are loaded from both folders, as anyone would load them.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from numpy.typing import NDArray

from leanvocab.errors import CheckpointError, DataError, first_line, shortened
from leanvocab.extras import is_instance
from leanvocab.reports.memory_estimate import format_ratio
from leanvocab.texts.counted_columns import Texts, choose_readers
from leanvocab.texts.data_files import load_splits
from leanvocab.texts.text_columns import in_memory, values_of
from leanvocab.texts.text_rows import find_parts
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary
from leanvocab.vocabulary.sources import holds_data_sets

if TYPE_CHECKING:
    from rich.table import Table

_TEXTS_AT_ONCE, _TEXTS_IN_A_BATCH = 256, 8
_NUM_SHOWN = 10
_MOST_TOKENS = 512  # of a text that goes through the models; a model may take fewer
_ROUNDING = 256 * 2.0**-23  # of the largest logit: sums of a few thousand float32 products in another order


@dataclass
class SplitUse:
    """Counts of some texts as both tokenizers split them; words are what white space divides."""

    texts: int = 0
    covered_texts: int = 0
    words: int = 0
    changed_words: int = 0
    tokens_before: int = 0
    tokens_after: int = 0
    unknown_before: int = 0
    unknown_after: int = 0

    def add(self, other: "SplitUse") -> None:
        """Add the counts of other texts."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class ChangedWord:
    """A word of texts that are not covered, its tokens before and after, and how often it occurs."""

    word: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    count: int


@dataclass
class ComparedOutput:
    """One output of both models (hidden states, logits of kept tokens): its values, how many differ in a bit, and by how much."""

    is_cut: bool
    values: int = 0
    differing: int = 0
    largest_difference: float = 0.0
    largest_value: float = 0.0
    allowed: float = 0.0

    @property
    def holds(self) -> bool:
        """The same bits; of logits, whose product with another number of rows may be summed otherwise, the same to rounding."""
        return self.differing == 0 or (self.is_cut and self.largest_difference <= self.allowed)


@dataclass(frozen=True)
class Proof:
    """What was compared, and whether all of it holds. rich shows it as tables.

    `splits`: by language, or by split of the data; `wrong_texts`: covered texts that are split otherwise, of which there should
    be none; `outputs`: by name, over `model_texts` distinct covered texts.
    """

    splits: dict[str, SplitUse]
    wrong_texts: tuple[str, ...]
    num_wrong: int
    changed_words: tuple[ChangedWord, ...]
    model_texts: int
    outputs: dict[str, ComparedOutput] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """True where each covered text has the same tokens, and the models the same values for them."""
        return self.num_wrong == 0 and all(output.holds for output in self.outputs.values())

    @property
    def total(self) -> SplitUse:
        """The counts of all texts."""
        total = SplitUse()
        for use in self.splits.values():
            total.add(use)
        return total

    def to_dict(self) -> dict[str, Any]:
        """Everything above as plain values, ready for JSON."""
        outputs = {name: asdict(output) | {"holds": output.holds} for name, output in self.outputs.items()}
        return asdict(self) | {"holds": self.holds, "total": asdict(self.total), "outputs": outputs}

    def printed(self) -> "list[Table | str]":
        """Tables and lines for a person."""
        parts: list[Table | str] = [_splits_table(self.splits, self.total)]
        if self.outputs:
            parts.append(_outputs_table(self.outputs, self.model_texts))
        if self.changed_words:
            parts.append("Words of texts that are not covered, the most frequent that are split otherwise:")
            parts += [
                f"  {word.word}: {' '.join(word.before)} → {' '.join(word.after)} ({word.count:,})"
                for word in self.changed_words
            ]
        if self.num_wrong:
            parts.append(f"{self.num_wrong:,} covered texts are split otherwise, such as {'; '.join(self.wrong_texts)}")
        parts.append("The proof holds." if self.holds else "The proof does NOT hold: do not use this folder.")
        return parts


def prove(
    full: str | Path,
    trimmed: str | Path,
    vocabulary: PartialVocabulary,
    texts: Any,
    *,
    columns: Sequence[str | tuple[str, str]] | None = None,
    language_column: str | None = None,
    tokenizer: Any = None,
    full_model: Any = None,
    model_texts: int | None = None,
) -> Proof:
    """Compare a trimmed folder with the full one, on texts.

    Args:
        full: the folder, or name, of the whole model, and of its tokenizer.
        trimmed: the folder that was made of it.
        vocabulary: the ids that were kept: the new id of a token is its position among them.
        texts: what `count_tokens` takes: a file, a folder or name (string or Path), a data set, or texts.
        columns: columns of texts, or of pairs; None: the usual ones.
        language_column: a column that says the language of each row; None: by split.
        tokenizer: the whole model's, where it does not lie in `full`.
        full_model: the whole model, loaded, where it is not what lies in `full` (a delta has been merged into it).
        model_texts: distinct covered texts that go through both models at most. None: all; 0: no model is loaded.

    Raises:
        DataError: there are no texts.
        CheckpointError: a folder holds no tokenizer or model that can be loaded, or one that takes more than texts.
    """
    before = _load(transformers.AutoTokenizer, full) if tokenizer is None else tokenizer
    after = _load(transformers.AutoTokenizer, trimmed)
    if slow := [type(each).__name__ for each in (before, after) if not getattr(each, "is_fast", False)]:
        raise CheckpointError(
            f"{slow[0]} works in Python, and does not say where its tokens stand: expected a tokenizer.json"
        )
    comparison = _Texts(before, after, vocabulary)
    for label, some in _labelled(texts, columns, language_column, before):
        comparison.add(label, some)
    if not comparison.splits:
        raise DataError("expected texts to prove it with, got none")
    inputs = sorted(list(comparison.inputs)[:model_texts], key=lambda text: len(text[0]))
    outputs = {}
    if inputs:
        whole = _load_model(full) if full_model is None else full_model.eval()
        outputs = _compare_models(whole, _load_model(trimmed), inputs, vocabulary, before)
    return comparison.proof(len(inputs), outputs)


def _load(auto_class: Any, folder: str | Path, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(folder, **options)
    except Exception as error:  # what lies in its files: readers raise whatever they meet
        raise CheckpointError(f"{str(folder)!r} cannot be loaded to prove it: {first_line(error)}") from error


def _load_model(folder: str | Path) -> Any:
    config = _load(transformers.AutoConfig, folder)
    (architecture, *_) = config.architectures or ("AutoModel",)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # weights that lie in neither folder, such as a pooler's, are drawn alike for both
        return _load(getattr(transformers, architecture, transformers.AutoModel), folder, dtype="auto").eval()


def _labelled(texts: Any, columns: Any, language_column: str | None, tokenizer: Any) -> Iterator[tuple[str, Texts]]:
    """All texts, by language or by split."""
    data = load_splits(texts) if isinstance(texts, str | Path) else texts
    parts = list(data.items()) if isinstance(data, Mapping) and holds_data_sets(data) else [("texts", data)]
    for split, whole in parts:
        for label, rows in _by_language(split, whole, language_column):
            for part in find_parts(rows):
                _, readers = choose_readers(part.kinds, columns, tokenizer, f" of {split!r}")
                for some in part.rows():
                    for reader in readers:
                        for chunk in reader(some, part.where):
                            yield label, chunk


def _by_language(split: str, data: Any, column: str | None) -> Iterator[tuple[str, Any]]:
    if column is None:
        yield split, data
        return
    rows = in_memory(pa.table(data)) if isinstance(data, Mapping) else data
    there = getattr(rows, "column_names", ())
    if not is_instance(rows, "datasets", "Dataset") or column not in there:
        raise DataError(
            f"{split!r} has no column {column!r} that says the language: its columns are {', '.join(there) or 'none'}"
        )
    languages = np.array([str(value) for value in values_of(rows, column)])
    for language in sorted(set(languages.tolist())):
        yield language, rows.select(np.flatnonzero(languages == language).tolist())


class _Texts:
    """The comparison of two tokenizers, text by text."""

    def __init__(self, before: Any, after: Any, vocabulary: PartialVocabulary) -> None:
        self._before, self._after, self._vocabulary = before, after, vocabulary
        self._new_ids: NDArray[np.int64] = np.full(max(vocabulary.full_size, len(before)), -1, np.int64)
        self._new_ids[vocabulary.token_ids] = np.arange(len(vocabulary))
        self._changes: Counter[tuple[str, tuple[str, ...], tuple[str, ...]]] = Counter()
        self._wrong: list[str] = []
        self.splits: dict[str, SplitUse] = {}
        self.inputs: dict[
            tuple[tuple[int, ...], ...], None
        ] = {}  # ids, and types of tokens, of covered texts, each once

    def add(self, label: str, texts: Texts) -> None:
        """Compare some texts."""
        use = self.splits.setdefault(label, SplitUse())
        for start in range(0, len(texts.firsts), _TEXTS_AT_ONCE):
            sides = [
                side[start : start + _TEXTS_AT_ONCE].to_pylist()
                for side in (texts.firsts, texts.seconds)
                if side is not None
            ]
            encoded = [
                tokenizer(
                    *sides, add_special_tokens=not texts.is_written, truncation=False, padding=False, verbose=False
                )
                for tokenizer in (self._before, self._after)
            ]
            for *text, old, new in zip(*sides, *(encoding.encodings for encoding in encoded), strict=True):
                use.add(self._compared(text, old, new))

    def proof(self, model_texts: int, outputs: dict[str, ComparedOutput]) -> Proof:
        """All that was compared."""
        changed = tuple(ChangedWord(*change, count) for change, count in self._changes.most_common(_NUM_SHOWN))
        return Proof(self.splits, tuple(self._wrong[:_NUM_SHOWN]), len(self._wrong), changed, model_texts, outputs)

    def _compared(self, text: list[str], old: Any, new: Any) -> SplitUse:
        """Counts of one text, whose words are looked at where it is not covered."""
        words = sum(len(part.split()) for part in text)
        new_ids = self._new_ids[np.asarray(old.ids, np.int64)]
        unknown = [old.tokens.count(self._before.unk_token), new.tokens.count(self._after.unk_token)]
        use = SplitUse(1, 0, words, 0, len(old.ids), len(new.ids), *unknown)
        if new_ids.size and new_ids.min() < 0:
            before, after = (_tokens_by_word(text, encoding) for encoding in (old, new))
            changes = [
                (word, tokens, after[at][1]) for at, (word, tokens) in enumerate(before) if tokens != after[at][1]
            ]
            self._changes.update(changes)
            use.changed_words = len(changes)
            return use
        use.covered_texts = 1
        if new_ids.tolist() == new.ids and old.tokens == new.tokens:
            self.inputs[tuple(old.ids), tuple(old.type_ids)] = None
        else:
            self._wrong.append(f"{shortened(' | '.join(text))}: {' '.join(old.tokens)} → {' '.join(new.tokens)}")
        return use


def _tokens_by_word(text: list[str], encoding: Any) -> list[tuple[str, tuple[str, ...]]]:
    """Each word of a text, or pair, with its tokens: those that end in it."""
    spans = [(side, *match.span()) for side, part in enumerate(text) for match in re.finditer(r"\S+", part)]
    tokens: list[list[str]] = [[] for _ in spans]
    at = 0
    for token, (_, stop), side in zip(encoding.tokens, encoding.offsets, encoding.sequence_ids, strict=True):
        if side is None or stop == 0:
            continue
        while at + 1 < len(spans) and (side, stop) > (spans[at][0], spans[at][2]):
            at += 1
        if spans and spans[at][0] == side and spans[at][1] < stop:
            tokens[at].append(token)
    return [(text[side][start:stop], tuple(those)) for (side, start, stop), those in zip(spans, tokens, strict=True)]


def _compare_models(
    full: Any, trimmed: Any, inputs: Sequence[Any], vocabulary: PartialVocabulary, tokenizer: Any
) -> dict[str, ComparedOutput]:
    """The outputs of both models for the same texts, batch by batch."""
    outputs: dict[str, ComparedOutput] = {}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id in vocabulary else None
    at_once = 1 if pad is None else _TEXTS_IN_A_BATCH
    most = min(_MOST_TOKENS, tokenizer.model_max_length, _most_positions(full.config))
    for start in range(0, len(inputs), at_once):
        batch = _batch(inputs[start : start + at_once], pad, most, "token_type_ids" in tokenizer.model_input_names)
        renumbered = batch | {"input_ids": vocabulary.to_partial(batch["input_ids"])}
        before, after = (_run(model, its) for model, its in ((full, batch), (trimmed, renumbered)))
        for name, tensor in before.items():
            width = tensor.shape[-1]
            is_cut = name in after and after[name].shape[-1] != width
            kept = torch.tensor(vocabulary.below(width).token_ids, device="cpu") if is_cut else None
            expected = tensor if kept is None else tensor[..., kept]
            got = after.get(name, expected[..., :0])[..., : expected.shape[-1]]
            _note(outputs.setdefault(name, ComparedOutput(is_cut)), expected, got)
    return outputs


def _most_positions(config: Any) -> int:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    # RoBERTa counts from behind its pad id.
    return positions - 2 if isinstance(positions, int) and positions > 2 else _MOST_TOKENS


def _batch(inputs: Sequence[Any], pad: int | None, most: int, has_types: bool) -> dict[str, torch.Tensor]:
    longest = min(most, max(len(ids) for ids, _ in inputs))
    ids = torch.full((len(inputs), longest), 0 if pad is None else pad, device="cpu")
    types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (its_ids, its_types) in enumerate(inputs):
        length = min(len(its_ids), longest)
        ids[row, :length] = torch.tensor(its_ids[:length], device="cpu")
        types[row, :length] = torch.tensor(its_types[:length], device="cpu")
        mask[row, :length] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    return batch | {"token_type_ids": types} if has_types else batch


def _run(model: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All tensors of a model's output by name, hidden states of each layer among them."""
    inputs = dict(batch)
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]
        inputs["decoder_attention_mask"] = inputs["attention_mask"]
        inputs.pop("token_type_ids", None)
    try:
        with torch.inference_mode():
            output = model(**inputs, output_hidden_states=True, return_dict=True)
    except Exception as error:  # of a model's own code: it wants images, or other inputs
        raise CheckpointError(
            f"{type(model).__name__} cannot be run on texts alone ({first_line(error)}): "
            "prove its tokens alone with model_texts=0"
        ) from error
    tensors: dict[str, torch.Tensor] = {}
    for name, value in output.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, tuple) and name.endswith("hidden_states"):
            tensors |= {f"{name}[{layer}]": tensor for layer, tensor in enumerate(value)}
    return tensors


def _note(output: ComparedOutput, expected: torch.Tensor, got: torch.Tensor) -> None:
    """Add the differences of two tensors to those of an output."""
    output.values += expected.numel()
    if expected.shape != got.shape or expected.dtype != got.dtype:
        output.differing += expected.numel()
        output.largest_difference = float("inf")
        return
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    differs = expected.contiguous().view(bits) != got.contiguous().view(bits)
    output.differing += int(differs.sum())
    wide_expected, wide_got = expected.double(), got.double()
    if differs.any():
        output.largest_difference = max(
            output.largest_difference, float((wide_expected - wide_got)[differs].abs().max())
        )
    finite = wide_expected[wide_expected.isfinite()]
    output.largest_value = max(output.largest_value, float(finite.abs().max()) if finite.numel() else 0.0)
    of_dtype = 4 * torch.finfo(expected.dtype).eps if expected.element_size() < 4 else 0.0
    output.allowed = output.largest_value * (_ROUNDING + of_dtype)


def _splits_table(splits: dict[str, SplitUse], total: SplitUse) -> "Table":
    from rich.table import Column, Table

    headings = ("texts", "covered", "words", "split otherwise", "tokens a word", "now", "unknown", "now")
    table = Table("", *(Column(heading, justify="right") for heading in headings), title="Texts and their tokens")
    for label, use in [*splits.items(), ("all", total)] if len(splits) > 1 else splits.items():
        words, tokens = max(use.words, 1), max(use.tokens_before, 1)
        table.add_row(
            label,
            f"{use.texts:,}",
            format_ratio(use.covered_texts / max(use.texts, 1)),
            f"{use.words:,}",
            format_ratio(use.changed_words / words),
            f"{use.tokens_before / words:.2f}",
            f"{use.tokens_after / words:.2f}",
            format_ratio(use.unknown_before / tokens),
            format_ratio(use.unknown_after / max(use.tokens_after, 1)),
        )
    return table


def _outputs_table(outputs: dict[str, ComparedOutput], num_texts: int) -> "Table":
    from rich.table import Column, Table

    headings = ("values", "differing", "by at most")
    table = Table(
        "output", *(Column(name, justify="right") for name in headings), "", title=f"Both models, {num_texts:,} texts"
    )
    for name, output in outputs.items():
        said = "same bits" if output.differing == 0 else "rounding" if output.holds else "DIFFERS"
        shown = f"{output.largest_difference:.1e}" if output.differing else ""
        table.add_row(name, f"{output.values:,}", f"{output.differing:,}", shown, said)
    return table
