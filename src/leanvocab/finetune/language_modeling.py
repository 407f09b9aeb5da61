"""Language modeling: which columns hold texts, and their token ids with the labels that are learned."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import DataCollatorForSeq2Seq

from leanvocab.choices import IGNORE_INDEX
from leanvocab.errors import DataError, ModelError, SettingsError, shortened
from leanvocab.extras import require
from leanvocab.finetune.causal_checks import check_causal, check_packed_examples_are_apart
from leanvocab.finetune.collators import EpochCallback, MaskingCollator, PaddingCollator, mask_to_validate
from leanvocab.finetune.scores import TokenScores, logits_of, sums_by_example
from leanvocab.finetune.settings import CAUSAL_LM, MASKED_LM, SEQ2SEQ_LM, DataSettings, FineTuneSettings
from leanvocab.finetune.tasks import Task, find_eval_split
from leanvocab.texts.chats import ChatWriter, Span, Tally, as_messages, is_message, parsed, template_values
from leanvocab.texts.packing import join_and_cut, lay_side_by_side, num_learned
from leanvocab.texts.text_columns import (
    check_column,
    check_no_gaps,
    check_texts,
    choose_text_columns,
    in_memory,
    map_in_memory,
    spelled,
    values_of,
)
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

datasets = require("datasets", extra="finetune")

_PAIRS = (("prompt", "completion"), ("source", "target"))
_INSTRUCTIONS = (("instruction", "input", "output"), ("instruction", "output"))
_CHATS = (("messages",), ("conversations",))
_TEXTS = (("text",), ("sentence",))
_TOOLS = "tools"  # the column beside chats that has them in the data sets of tool calls
_VALUES = (
    "chat_template_kwargs"  # the column beside chats with values for their template, as TRL reads it; and the setting
)
_ROW = "row"  # beside the columns of a batch: where each row stands
_BLOCKS_AT_ONCE = 1000
_FATES = {
    "cut": "were cut to {0} tokens.",
    "left out": "were left out: nothing of them is left to learn within {0} tokens.",
    "by TRL": "were written by TRL's training template, since the tokenizer's own does not say where their replies are.",
    "not told": "have values in column 'chat_template_kwargs' that the tokenizer's chat template does not use.",
    "last reply": "are chats of which the last reply alone is learned: the tokenizer's chat template writes a chat in "
    "another way as it goes on, and marks no reply ({{% generation %}}).",
}


Columns = dict[str, list[Any]]
"""A batch of rows."""


@dataclass(frozen=True)
class LanguageTask(Task):
    """Columns and splits of one fine-tuning of a language model.

    `kind` is causal-lm, seq2seq-lm or masked-lm; `source` says what `columns` hold: one text, prompt and completion, or
    messages (a chat).
    """

    kind: str
    source: str
    columns: tuple[str, ...]
    train_split: str
    eval_split: str | None
    _notes: tuple[str, ...] = ()

    @property
    def optional(self) -> str | None:
        """The column that may have gaps: the input of an instruction, which not every one needs."""
        return self.columns[1] if len(self.columns) == len(_INSTRUCTIONS[0]) else None

    @property
    def understood(self) -> dict[str, Any]:
        if self.source == "prompts":
            columns = {"prompt": [*self.columns[:-1]], "completion": [self.columns[-1]]}
        else:
            columns = {self.source: [*self.columns]}
        return {"task": self.kind, "columns": columns}

    @property
    def token_columns(self) -> tuple[str, ...]:
        """Columns of the encoded data with ids to count. The labels of the other kinds are input ids."""
        return ("input_ids", "labels") if self.kind == SEQ2SEQ_LM else ("input_ids",)

    @property
    def draws_words(self) -> bool:
        return self.kind == MASKED_LM

    def check_network(self, network: Any, settings: DataSettings) -> None:
        if self.kind == CAUSAL_LM:
            check_causal(network)
        if settings.packing and self.source != "text":
            check_packed_examples_are_apart(network)

    def encode(self, splits: Any, tokenizer: Any, settings: DataSettings) -> tuple[Any, tuple[str, ...]]:
        """`input_ids`, and `labels` where they are known before masking, of every split; and what a user should know.

        Examples of which nothing would be learned (a prompt that fills max_length by itself) are left out, and said.

        Raises:
            DataError: nothing at all is left of a split, a template refuses a chat, or its replies cannot be told from the rest.
            ModelError: chats, and a tokenizer without a chat template.
        """
        if self.source == "messages" and not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "the tokenizer has no chat template, which a column of messages needs; set tokenizer.chat_template and "
                "save it, or give prompt and completion columns"
            )
        encoded, notes = datasets.DatasetDict(), [*self._notes]
        if settings.chat_template_kwargs:
            _check_values(settings.chat_template_kwargs, self, tokenizer)
        if self.kind == CAUSAL_LM and self.source != "messages" and tokenizer.eos_token_id is None:
            notes.append("The tokenizer has no end-of-sequence token: the texts are learned without an end.")
        if settings.packing and self.source == "text":
            notes.append("Texts are joined and cut into blocks (packing): those in one block see one another.")
        for name, split in splits.items():
            tally = dict.fromkeys(_FATES, 0)
            to_rows = partial(self._to_rows, name=name, tally=tally, tokenizer=tokenizer, settings=settings)
            rows = map_in_memory(split, name, to_rows, _features(self.kind))
            if len(rows) == 0:
                raise DataError(
                    f"nothing is left to learn of the {len(split):,} rows of split {name!r}: their texts are empty, or "
                    f"their prompts fill max_length ({settings.max_length} tokens) by themselves"
                )
            encoded[name] = _packed(rows, self, settings.max_length) if settings.packing else rows
            for fate, num_rows in tally.items():
                if num_rows:
                    rows_of_split = f"{num_rows:,} of {len(split):,} rows of split {name!r}"
                    notes.append(f"{rows_of_split} {_FATES[fate].format(settings.max_length)}")
        return encoded, tuple(notes)

    def _to_rows(self, batch: Columns, numbers: list[int], *, name: str, **options: Any) -> Columns:
        wanted = {column: batch[column] for column in (*self.columns, _TOOLS, _VALUES) if column in batch}
        wanted[_ROW] = [f"row {number} of split {name!r}" for number in numbers]
        return _TO_ROWS[self.kind](wanted, task=self, **options)

    def batches(
        self, encoded: Any, network: Any, tokenizer: Any, kept: PartialVocabulary | None, settings: FineTuneSettings
    ) -> tuple[Any, tuple[Any, ...]]:
        """The collator; of a masked language model it masks anew each epoch, but for the rows to validate on, masked here.

        Raises:
            DataError: there is no word among the kept ids that a masked language model could draw.
        """
        if self.kind == SEQ2SEQ_LM:
            return DataCollatorForSeq2Seq(tokenizer, model=network), ()
        if self.kind == CAUSAL_LM:
            end = tokenizer.eos_token_id
            return PaddingCollator(end if tokenizer.pad_token_id is None else tokenizer.pad_token_id), ()
        assert kept is not None
        special_ids = tokenizer.all_special_ids
        words = np.setdiff1d(kept.token_ids, special_ids)
        if not len(words):
            raise DataError("the data hold no token but special ones: there is no word to mask")
        options: dict[str, Any] = {"masked_ratio": settings.masked_ratio, "seed": settings.seed}
        collator = MaskingCollator(tokenizer.pad_token_id, tokenizer.mask_token_id, words, special_ids, **options)
        if self.eval_split:
            encoded[self.eval_split] = mask_to_validate(encoded[self.eval_split], collator)
        return collator, (EpochCallback(collator),)

    def scoring(self) -> dict[str, Any]:
        def sums(given: Any, labels: Any) -> Any:
            return sums_by_example(logits_of(given), labels, predicts_next=self.kind == CAUSAL_LM)

        return {"compute_metrics": TokenScores(), "preprocess_logits_for_metrics": sums}


def find_language_task(splits: Any, settings: DataSettings) -> LanguageTask:
    """Finds the texts, by name where the settings name them, and checks every row of them.

    Raises:
        DataError: a column is missing, holds something else, or has gaps.
    """
    train, evaluation = settings.train_split, find_eval_split(splits, settings)
    source, columns = _find_columns(splits[train].column_names, settings)
    assert settings.task is not None
    notes = _notes_of(splits[train].column_names, columns, settings)
    task = LanguageTask(settings.task, source, columns, train, evaluation, notes)
    for name, split in splits.items():
        if source == "messages":
            _check_messages(name, split, columns[0], settings)
        else:
            check_texts(name, split, columns, task.optional)
    return task


def _find_columns(names: list[str], settings: DataSettings) -> tuple[str, tuple[str, ...]]:
    if settings.task == MASKED_LM or settings.text_columns:
        return "text", choose_text_columns("text", settings.text_columns, _TEXTS, names)
    if settings.prompt_column and settings.completion_column:
        (prompt,) = choose_text_columns("prompt", (settings.prompt_column,), (), names)
        (completion,) = choose_text_columns("completion", (settings.completion_column,), (), names)
        return "prompts", (prompt, completion)
    if settings.messages_column:
        return "messages", choose_text_columns("messages", (settings.messages_column,), (), names)
    usual = _usual(settings)
    if there := _all_usual(names, settings):
        return there[0]
    for pair in _PAIRS:
        for present, absent in (pair, pair[::-1]):
            if present in names:
                raise DataError(
                    f"there is a column {present!r} without {absent!r}; the columns are {', '.join(names)}. Name both with "
                    "prompt_column and completion_column"
                )
    looked_for = ", ".join(" + ".join(columns) for groups in usual.values() for columns in groups)
    how = "prompt_column and completion_column" + ("" if settings.task == SEQ2SEQ_LM else ", or text_columns")
    raise DataError(
        f"found nothing to learn from: looked for {looked_for}; the columns are {', '.join(names)}. Name them with {how}"
    )


def _usual(settings: DataSettings) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Groups of usual names by what they hold, those first that are taken first."""
    prompts: dict[str, tuple[tuple[str, ...], ...]] = {"prompts": (*_PAIRS, *_INSTRUCTIONS)}
    return prompts if settings.task == SEQ2SEQ_LM else {**prompts, "messages": _CHATS, "text": _TEXTS}


def _all_usual(names: list[str], settings: DataSettings) -> list[tuple[str, tuple[str, ...]]]:
    of_all = ((source, spelled(group, names)) for source, groups in _usual(settings).items() for group in groups)
    return [(source, columns) for source, columns in of_all if columns]


def _notes_of(names: list[str], taken: tuple[str, ...], settings: DataSettings) -> tuple[str, ...]:
    """What was chosen where the settings name nothing: of several columns that could be learned, and for instructions."""
    if settings.task == MASKED_LM or settings.text_columns or settings.prompt_column or settings.messages_column:
        return ()
    notes = []
    others = [" + ".join(columns) for _, columns in _all_usual(names, settings) if not set(columns) & set(taken)]
    if others:
        notes.append(
            f"Of the columns, {' + '.join(taken)} are learned, and not {' or '.join(others)}: name others to learn."
        )
    if spelled(_INSTRUCTIONS[1], taken):
        notes.append(f"A prompt is {' and '.join(taken[:-1])}, with a blank line after each.")
    return tuple(notes)


def _check_messages(split_name: str, split: Any, column: str, settings: DataSettings) -> None:
    check_column(split_name, split, column, "messages")
    chats = values_of(split, column)
    check_no_gaps(split_name, column, [not chat for chat in chats], "messages")
    chats = [as_messages(chat) for chat in chats]
    if not any(isinstance(chat, list) for chat in chats):
        raise DataError(
            f"column {column!r} of split {split_name!r} holds {split.features[column]}; expected lists of messages, "
            f"{{'role': …, 'content': …}}, or JSON of them"
        )
    for at, chat in enumerate(chats):
        if not isinstance(chat, list) or not all(map(is_message, chat)):
            raise DataError(
                f"row {at} of split {split_name!r}: column {column!r} holds something else than messages; expected a list "
                f"of {{'role': …, 'content': …}}"
            )
    roles = sorted({str(message["role"]) for chat in chats for message in chat})
    if not settings.train_on_prompts and "assistant" not in roles:
        raise DataError(
            f"nothing is left to learn of split {split_name!r}: replies are the messages of the role 'assistant', and column "
            f"{column!r} has the roles {', '.join(roles)}. Rename the role, or learn the whole chats (train_on_prompts)"
        )


# --- token ids --------------------------------------------------------------------------------------------------------


def _features(kind: str) -> Any:
    names = ("input_ids",) if kind == MASKED_LM else ("input_ids", "labels")
    return datasets.Features({name: datasets.Sequence(datasets.Value("int32")) for name in names})


def _causal_rows(batch: Columns, tally: Tally, task: LanguageTask, tokenizer: Any, settings: DataSettings) -> Columns:
    joins = settings.packing and task.source == "text"  # then nothing is cut off
    examples = list(_pieces(batch, tally, task, tokenizer, settings))
    rows: Columns = {"input_ids": [], "labels": []}
    for ids, labels in _joined(examples, tokenizer, is_chat=task.source == "messages"):
        if not joins and len(ids) > settings.max_length:
            tally["cut"] += 1
            ids, labels = ids[: settings.max_length], labels[: settings.max_length]
        # Nothing stands before the first id to predict it from. Said here, it is not counted where losses are averaged.
        labels = [IGNORE_INDEX, *labels[1:]]
        if not joins and not num_learned({"labels": labels}):
            tally["left out"] += 1
            continue
        rows["input_ids"].append(ids)
        rows["labels"].append(labels)
    return rows


def _pieces(
    batch: Columns, tally: Tally, task: LanguageTask, tokenizer: Any, settings: DataSettings
) -> Iterator[list[Span]]:
    if task.source == "text":
        yield from ([(text, True)] for text in batch[task.columns[0]])
    elif task.source == "prompts":
        for prompt, completion in zip(_prompts(batch, task), batch[task.columns[-1]], strict=True):
            yield [(prompt, settings.train_on_prompts), (completion, True)]
    else:
        writer, chats = ChatWriter(tokenizer), batch[task.columns[0]]
        told = template_values(settings.chat_template_kwargs, tokenizer)
        besides = (batch.get(name) or [None] * len(chats) for name in (_TOOLS, _VALUES))
        for row, chat, tools, values in zip(batch[_ROW], chats, *besides, strict=True):
            try:
                writer.tools, own = _tools(tools), template_values(values, tokenizer)
                writer.values = told | own
                tally["not told"] += bool(writer.unused(own))
                yield _chat_pieces(writer, as_messages(chat), settings, tally)
            except DataError as error:
                raise DataError(f"{row}: {error}; change that chat, leave it out, or give another template") from error


def _chat_pieces(writer: ChatWriter, chat: list[Any], settings: DataSettings, tally: Tally) -> list[Span]:
    if settings.train_on_prompts:
        return [(writer.written(chat), True)]
    return writer.spans(chat, settings.max_length, tally)


def _check_values(given: str, task: LanguageTask, tokenizer: Any) -> None:
    """Raises SettingsError where values were given for a template that uses them not, or where there are no chats to write."""
    if task.source != "messages":
        raise SettingsError(f"{_VALUES} are for the template of chats, and the data are {task.source}; leave them out")
    try:
        unused = ChatWriter(tokenizer).unused(template_values(given, tokenizer))
    except DataError as error:
        raise SettingsError(str(error)) from error
    if unused:
        raise SettingsError(
            f"{_VALUES} sets {unused[0]!r}, which the tokenizer's chat template does not use; look for its name there"
        )


def _prompts(batch: Columns, task: LanguageTask) -> list[str]:
    """Prompts; those of instructions are made of two columns, with a blank line after each that is not empty."""
    columns = [batch[column] for column in task.columns[:-1]]
    if not spelled(_INSTRUCTIONS[1], task.columns):
        return columns[0]
    return ["".join(f"{part}\n\n" for part in parts if part) for parts in zip(*columns, strict=True)]


def _tools(value: Any) -> list[Any] | None:
    """The tools that a chat is offered: a list, or JSON of one, since tools of different parameters have no one type."""
    tools = parsed(value)
    if tools and not isinstance(tools, list):
        raise DataError(f"column {_TOOLS!r} holds {shortened(value)}; expected a list of tools, or JSON of one")
    return tools or None


def _joined(examples: list[list[Span]], tokenizer: Any, *, is_chat: bool) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels of each example. Its pieces are tokenized one by one, so that a prompt has the ids it has alone.

    The tokenizer's own first tokens (a beginning of sequence) come first, the end of sequence comes last; a chat template
    writes both itself.
    """
    first = tokenizer(
        [pieces[0][0] for pieces in examples],
        add_special_tokens=not is_chat,
        return_special_tokens_mask=True,
        verbose=False,
    )
    others = [text for pieces in examples for text, _ in pieces[1:]]
    rest = iter(tokenizer(others, add_special_tokens=False, verbose=False)["input_ids"] if others else ())
    end = [] if is_chat or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for pieces, ids, added in zip(examples, first["input_ids"], first["special_tokens_mask"], strict=True):
        length = len(ids)
        while not is_chat and length and added[length - 1]:
            length -= 1
        parts = [ids[:length], *(next(rest) for _ in pieces[1:]), end]
        learned = [*(learns for _, learns in pieces), True]
        labels = [part if learns else [IGNORE_INDEX] * len(part) for part, learns in zip(parts, learned, strict=True)]
        yield list(chain.from_iterable(parts)), list(chain.from_iterable(labels))


def _seq2seq_rows(batch: Columns, tally: Tally, task: LanguageTask, tokenizer: Any, settings: DataSettings) -> Columns:
    sources, targets = _prompts(batch, task), batch[task.columns[-1]]
    inputs = tokenizer(sources, truncation=True, max_length=settings.max_length)["input_ids"]
    labels = tokenizer(text_target=targets, truncation=True, max_length=settings.max_target_length)["input_ids"]
    kept = [at for at, ids in enumerate(labels) if ids and inputs[at]]
    tally["left out"] += len(labels) - len(kept)
    return {"input_ids": [inputs[at] for at in kept], "labels": [labels[at] for at in kept]}


def _masked_rows(batch: Columns, tally: Tally, task: LanguageTask, tokenizer: Any, settings: DataSettings) -> Columns:
    special = set(tokenizer.all_special_ids)
    is_fast = bool(getattr(tokenizer, "is_fast", False))  # others give no pieces of long texts
    options = {"truncation": True, "max_length": settings.max_length, "return_overflowing_tokens": is_fast}
    pieces = tokenizer(batch[task.columns[0]], verbose=False, **options)["input_ids"]
    kept = [ids for ids in pieces if set(ids) - special]
    tally["left out"] += len(pieces) - len(kept)
    return {"input_ids": kept}


_TO_ROWS = {CAUSAL_LM: _causal_rows, SEQ2SEQ_LM: _seq2seq_rows, MASKED_LM: _masked_rows}


def _packed(rows: Any, task: LanguageTask, max_length: int) -> Any:
    """Blocks in memory; Python's lists hold no more than the open blocks and those of one batch."""
    names = ["input_ids", "labels"]
    if task.source == "text":
        blocks = join_and_cut((row["input_ids"] for row in rows), max_length)
    else:
        names.append("position_ids")
        blocks = lay_side_by_side(rows, max_length)
    schema = pa.schema([(name, pa.list_(pa.int32())) for name in names])
    batches = []
    while batch := list(islice(blocks, _BLOCKS_AT_ONCE)):
        batches.append(pa.RecordBatch.from_pylist(batch, schema))
    return in_memory(pa.Table.from_batches(batches, schema))
