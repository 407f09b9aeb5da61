"""A checkpoint on disk, or a model in memory → a folder with the kept rows alone, its tokenizer too; whole or not at all.

Everything that can be refused is refused first, from headers, configs and the tokenizer's files. Then the weights are
streamed, and a recipe is written beside them (`trimming.json`), from which the same bytes can be made again.
"""

import contextlib
import filecmp
import hashlib
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from leanvocab import __version__
from leanvocab.checkpoints.delta_format import (
    CONFIG,
    DESCRIPTION,
    MODEL_CONFIG,
    BaseTensor,
    Description,
    is_delta,
    write_note_of,
)
from leanvocab.checkpoints.merge import base_and_delta, folder_at, merge_checkpoint
from leanvocab.checkpoints.merge_plan import (
    Changes,
    Plan,
    load_vocabulary,
    make_plan,
    merged_config,
    read_changes,
)
from leanvocab.errors import CheckpointError, DataError, VocabularyError
from leanvocab.files.atomic_folders import check_apart, clear_leftovers, put, sibling, swap, sync_tree
from leanvocab.files.free_space import check_free_space
from leanvocab.files.headers import INDEX, Weights, read_weights
from leanvocab.files.presence import is_entry, is_file, is_folder, is_there
from leanvocab.files.side_files import SideFiles, copy_files, digests_of, sort_side_files, write_files
from leanvocab.files.untrusted_files import parse_object, read_json
from leanvocab.progress import ProgressBar
from leanvocab.trimming.model_configs import refuse_quantized
from leanvocab.trimming.model_files import ModelFiles
from leanvocab.trimming.recipe import (
    FROM_BASE,
    NONE,
    RECIPE,
    Options,
    Recipe,
    Rows,
    Source,
    check_same,
    name_of_tokenizer,
    read_recipe,
)
from leanvocab.trimming.tokenizer_files import TokenizerFiles, is_tokenizer_file
from leanvocab.trimming.trimmed_files import KeptRows, TrimmedPlan, WrittenWeights, make_trimmed_plan, write_trimmed
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

if TYPE_CHECKING:
    from leanvocab.trimming.proof import Proof

Columns: TypeAlias = Sequence[str | tuple[str, str]] | None
_NOTHING = Changes({}, Description("", None, {}, {}, {}))
_OCCUPIED = (
    "{target} is there already, and is not this trimming's result ({reason}); name another output, or replace it with "
    "overwrite=True (--overwrite)"
)
_MOST_PADDING = 65_536


@dataclass(frozen=True)
class TrimResult:
    """Account of a trimming. `already_there`: nothing was done, since the output was this trimming's result.

    Attributes:
        rows_for_model: kept beside the given ones, since the model inserts them, or computes with them.
        rows_for_splits: kept beside these, since the tokenizer needs them so that what is kept splits as it did.
        rows_of_padding: rows at the end that no id reaches; they are among `rows_after`.
        tensors: those that were cut.
        left_out: files of the base that the result does not have, since they hold all rows.
    """

    output: Path
    rows_before: int
    rows_after: int
    rows_for_model: int
    rows_for_splits: int
    rows_of_padding: int
    bytes_before: int
    bytes_after: int
    tensors: tuple[str, ...]
    tokenizer_files: tuple[str, ...]
    left_out: tuple[str, ...]
    already_there: bool
    proof: "Proof | None"
    seconds: float


def export_trimmed(
    source: Any,
    vocabulary: PartialVocabulary | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    delta: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    texts: Collection[str] | None = None,
    pad_to_multiple_of: int | None = None,
    overwrite: bool = False,
    allow_rounding: bool = False,
    verify: Any = None,
    columns: Columns = None,
    language_column: str | None = None,
    progress: bool | None = None,
) -> TrimResult:
    """Writes a model and its tokenizer with the kept rows alone, for good, in a folder that plain `from_pretrained` loads.

    Ids are renumbered in their order, in every file. What is kept computes and splits as it did; rows that this needs are
    kept beside those of `vocabulary`, and the result says how many. Beside the files lies `trimming.json`, from which
    `trim_by_recipe` makes the same bytes again.

    Args:
        source: folder of a checkpoint (safetensors), or its name in the hub's cache; or a model in memory, shrunk or not,
            which is first written in full beside `output`.
        vocabulary: the rows to keep, or the file of it.
        output: folder to make; it appears whole or not at all. Must be free, or hold this trimming's result.
        delta: a delta (`save_delta`) over the base, whose rows and tensors take the place of the base's.
        tokenizer: one of transformers, or a folder. None: the one in the source's folder. False: none.
        texts: unknown words of these alone have to stay unknown; None: all that are, for which some WordPiece needs many rows.
        pad_to_multiple_of: rows are added at the end until their number is a multiple: copies of the pad token's row.
        overwrite: replace what lies in `output`.
        allow_rounding: as in merge_checkpoint.
        verify: texts, as count_tokens takes them, with which the result is proved before it appears: both models are loaded.
        columns, language_column: those of `verify` that hold texts, or pairs of them (None: the usual ones), and a language.
        progress: a bar with bytes; by default on a terminal, when it takes long.

    Raises:
        CheckpointError, VocabularyError: something is not what it should be, or cannot be trimmed: which, and why.
        OSError: the output cannot be written. In each case nothing has changed.

    Source: docs/trimming.md, docs/decisions/trimmed-splits.md.
    """
    options = Options(_checked_multiple(pad_to_multiple_of), allow_rounding)
    proving = _proving(verify, columns, language_column)
    if not isinstance(vocabulary, PartialVocabulary):
        vocabulary = load_vocabulary(Path(vocabulary))
    target = _target(output, overwrite)
    if isinstance(source, str | os.PathLike):
        trim = _Trim(source, delta, tokenizer, target, options, overwrite, progress)
        return trim.run(vocabulary, proving, texts)
    if delta is not None:
        raise CheckpointError("delta= is for a base on disk; a model in memory holds its trained rows: leave it out")
    if tokenizer is None:
        raise CheckpointError(
            "a model in memory has no tokenizer: hand it over, tokenizer=…, or trim it alone, tokenizer=False"
        )
    with _saved_in_full(source, target) as folder:
        trim = _Trim(folder, None, tokenizer, target, options, overwrite, progress, name="")
        return trim.run(vocabulary, proving, texts)


def trim_by_recipe(
    recipe: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    delta: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    verify: Any = None,
    columns: Columns = None,
    language_column: str | None = None,
    progress: bool | None = None,
) -> TrimResult:
    """Makes again what a `trimming.json` says, byte for byte.

    Args:
        recipe: the file.
        output: as in export_trimmed.
        base: folder of the base, or its name in the hub's cache. None: the one that the recipe names.
        delta: folder of the delta, where the recipe has one. None: the one that the recipe names.
        tokenizer: the tokenizer, where the recipe's is another than the base's.
        overwrite, verify, columns, language_column, progress: as in export_trimmed.

    Raises:
        CheckpointError: base, delta or tokenizer are not those that the recipe was made with, or the result has other bytes.
        OSError: the output cannot be written. In each case nothing has changed.
    """
    proving = _proving(verify, columns, language_column)
    path = Path(recipe)
    known = read_recipe(path)
    base, delta = base or known.base.name, delta or (known.delta.name if known.delta is not None else None)
    if not base:
        raise CheckpointError(f"{path} was made of a model in memory: name a folder that holds it, base=…")
    if delta is not None and known.delta is None:
        raise CheckpointError(f"{path} was made without a delta, expected none, found {os.fspath(delta)}")
    if known.tokenizer == NONE:
        tokenizer = False
    elif tokenizer is None and known.tokenizer != FROM_BASE:
        tokenizer = known.tokenizer
    target = _target(output, overwrite)
    trim = _Trim(base, delta, tokenizer, target, known.options, overwrite, progress, recipe=known)
    return trim.run(known.vocabulary, proving)


def _proving(texts: Any, columns: Columns, language_column: str | None) -> "_Proving | None":
    if texts is not None:
        return _Proving(texts, columns, language_column)
    if columns is not None or language_column is not None:
        raise DataError(
            "columns= and language_column= are of the texts of a proof: give verify=, the texts that have it, with them"
        )
    return None


def _checked_multiple(multiple: int | None) -> int | None:
    if multiple is not None and (type(multiple) is not int or not 1 <= multiple <= _MOST_PADDING):
        raise VocabularyError(f"expected pad_to_multiple_of from 1 to {_MOST_PADDING:,}, or None, got {multiple!r}")
    return multiple


def _target(output: str | os.PathLike[str], overwrite: bool) -> Path:
    """The folder to make; raises `CheckpointError` where something else than a trimmed checkpoint lies there."""
    target = Path(os.path.realpath(output))
    if is_there(target) and not is_folder(target):
        raise CheckpointError(f"{target} is a file, expected a folder, or a path that is free")
    clear_leftovers(target)
    if not overwrite and is_folder(target) and any(target.iterdir()) and not is_file(target / RECIPE):
        raise CheckpointError(_OCCUPIED.format(target=target, reason=f"no {RECIPE} lies there"))
    return target


@contextlib.contextmanager
def _saved_in_full(model: Any, target: Path) -> Iterator[Path]:
    """A folder beside the output with all rows of a model, for as long as the block lasts."""
    from leanvocab.checkpoints.full_saving import save_full

    if hasattr(model, "peft_config"):
        raise CheckpointError(
            f"{type(model).__name__} has an adapter around it, expected a model alone: merge_and_unload() gives it"
        )
    if not hasattr(model, "save_pretrained"):
        raise CheckpointError(
            f"expected a folder, a name, or a model of transformers, got {type(model).__name__}, which has no config to write"
        )
    with sibling(target.with_name(f"{target.name}.full")) as folder:
        yield save_full(model, folder / "model")


@dataclass(frozen=True)
class _Inputs:
    """Everything that a trimming reads, checked."""

    weights: Weights
    changes: Changes
    merged: Plan
    model: ModelFiles
    tokenizer: TokenizerFiles | None
    side_files: SideFiles


@dataclass(frozen=True)
class _Proving:
    """What a proof is made with."""

    texts: Any
    columns: Columns
    language_column: str | None


class _Trim:
    """One trimming of a base on disk."""

    def __init__(
        self,
        base: str | os.PathLike[str],
        delta: str | os.PathLike[str] | None,
        tokenizer: Any,
        target: Path,
        options: Options,
        overwrite: bool,
        progress: bool | None,
        *,
        name: str | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        self.names = (os.fspath(base) if name is None else name, None if delta is None else os.fspath(delta))
        self.base, self.delta = _folders(base, delta, recipe)
        others = {"base": self.base} | ({} if self.delta is None else {"delta": self.delta})
        check_apart(target, **others)
        self.tokenizer, self.target, self.options, self.recipe = tokenizer, target, options, recipe
        self.overwrite, self.progress = overwrite, progress

    def run(
        self, given: PartialVocabulary, proving: _Proving | None, texts: Collection[str] | None = None
    ) -> TrimResult:
        """Reads, checks and writes everything, and says what was done."""
        started = time.perf_counter()
        inputs = self._inputs()
        if proving is not None and inputs.tokenizer is None:
            raise CheckpointError("a proof compares tokens, and without a tokenizer there are none: leave verify= out")
        kept, rows = self._kept(inputs, given, texts)
        plan = make_trimmed_plan(inputs.merged, inputs.changes, _dims(inputs, kept), kept)
        files = _new_files(inputs, kept)
        self._refuse_another_result(kept.new_ids.vocabulary)
        num_side_bytes = sum((self.base / name).stat().st_size for name in inputs.side_files.copied)
        check_free_space(
            self.target.parent,
            plan.num_bytes + num_side_bytes + sum(map(len, files.values())),
            "the trimmed checkpoint",
            "name another output, or make room",
        )
        with sibling(self.target) as folder:
            self._write(folder, inputs, plan, files, rows)
            sync_tree(folder)
            proof = None if proving is None else self._proof(folder, kept.new_ids.vocabulary, proving)
            is_new = self._put(folder)
        return self._result(inputs, plan, files, rows, is_new, proof, started)

    def _inputs(self) -> _Inputs:
        weights = read_weights(self.base)
        changes = _NOTHING if self.delta is None else read_changes(self.delta, None, weights)
        merged = make_plan(weights, changes, self.options.allow_rounding)
        model = self._model()
        tokenizer = self._tokenizer()
        of_tokenizer = {name for name in os.listdir(self.base) if is_tokenizer_file(name)}
        names = {file.path.name for file in weights.files} | {INDEX}
        side_files = sort_side_files(self.base, names, of_tokenizer | model.configs.keys() | {RECIPE})
        lost = of_tokenizer - (tokenizer.names if tokenizer is not None and self.tokenizer is None else set())
        left_out = (*side_files.left_out, *sorted(lost))
        copied = side_files.copied
        if self.recipe is not None:
            copied = tuple(name for name in copied if name in self.recipe.base.files)
        return _Inputs(weights, changes, merged, model, tokenizer, SideFiles(copied, left_out))

    def _model(self) -> ModelFiles:
        of_delta = None if self.delta is None else merged_config(self.base, self.delta)
        config = (
            None if of_delta is None else parse_object(Path(str(self.delta), MODEL_CONFIG), of_delta, infinity=True)
        )
        if is_entry(self.base / CONFIG):
            refuse_quantized(self.base, read_json(self.base, CONFIG, infinity=True)[1])
        return ModelFiles.read(self.base, config)

    def _tokenizer(self) -> TokenizerFiles | None:
        if self.tokenizer is False:
            return None
        if self.tokenizer is not None:
            given = self.tokenizer
            return TokenizerFiles.read(folder_at(given, "base") if isinstance(given, str | os.PathLike) else given)
        if not any(is_tokenizer_file(name) for name in os.listdir(self.base)):
            raise CheckpointError(
                f"{self.base}: expected a tokenizer's files beside the model, found none; hand it over, tokenizer=…, or trim the "
                "model alone, tokenizer=False"
            )
        return TokenizerFiles.read(self.base)

    def _kept(self, inputs: _Inputs, given: PartialVocabulary, texts: Collection[str] | None) -> tuple[KeptRows, Rows]:
        """The ids that stay, with all that the model and the tokenizer need beside those given; and how many rows that adds."""
        num_rows = inputs.model.full_size
        if self.recipe is None:
            fitted = given.fitted_to(num_rows)
            if fitted.full_size != num_rows:
                raise VocabularyError(
                    f"{self.base}: the vocabulary's full size is {fitted.full_size:,}, the model has {num_rows:,} rows; "
                    f"build it with full_size={num_rows}, or count with the model's own folder (leanvocab count --tokenizer …)"
                )
            needed = np.union1d(fitted.token_ids, inputs.model.required_ids())
            closed = needed if inputs.tokenizer is None else inputs.tokenizer.closed(needed, texts)
            if not len(closed):
                raise VocabularyError("expected at least one row to keep, got an empty vocabulary")
            vocabulary = PartialVocabulary(closed, max(num_rows, int(closed[-1]) + 1))
            numbers = len(fitted), len(needed) - len(fitted), len(closed) - len(needed)
        else:
            vocabulary, rows = self.recipe.vocabulary, self.recipe.rows
            numbers = rows.wanted, rows.for_model, rows.for_splits
        new_ids = inputs.model.new_ids(vocabulary, self.options.pad_to_multiple_of)
        padding_id = inputs.model.padding_id(vocabulary)
        return KeptRows(new_ids, padding_id), Rows(*numbers, new_ids.padding, padding_id)

    def _refuse_another_result(self, vocabulary: PartialVocabulary) -> None:
        """Raises `CheckpointError`, before anything is written, where the output is certainly another trimming's result."""
        if self.overwrite or not is_file(self.target / RECIPE):
            return
        there = read_recipe(self.target / RECIPE).vocabulary
        if there != vocabulary:
            reason = f"it keeps {len(there):,} of {there.full_size:,} rows, here {len(vocabulary):,} would stay"
            raise CheckpointError(_OCCUPIED.format(target=self.target, reason=reason))

    def _write(self, folder: Path, inputs: _Inputs, plan: TrimmedPlan, files: Mapping[str, bytes], rows: Rows) -> None:
        bar = ProgressBar("trimming", plan.num_bytes, self.progress)
        try:
            weights = write_trimmed(folder, plan, bar)
        finally:
            bar.close()
        copy_files(self.base, folder, inputs.side_files.copied)
        write_files(self.base, folder, files)
        write_note_of(folder, inputs.changes.description)
        made = self._recipe(inputs, plan, weights, files, rows)
        if self.recipe is not None:
            check_same(self.recipe, made)
        (folder / RECIPE).write_text((self.recipe or made).text(), encoding="utf-8")

    def _recipe(
        self, inputs: _Inputs, plan: TrimmedPlan, weights: WrittenWeights, files: Mapping[str, bytes], rows: Rows
    ) -> Recipe:
        of_tokenizer = inputs.tokenizer.names if inputs.tokenizer is not None and self.tokenizer is None else ()
        own_configs = [name for name in inputs.model.configs if is_entry(self.base / name)]
        read = sorted({*inputs.side_files.copied, *own_configs, *of_tokenizer})
        name, of_delta = self.names
        delta = None
        if self.delta is not None and of_delta is not None:
            said = [name for name in (DESCRIPTION, MODEL_CONFIG) if is_entry(self.delta / name)]
            delta = Source(of_delta, digests_of(self.delta, said))
        entries = {name: entry for name, (_, entry) in inputs.weights.tensors.items()}
        return Recipe(
            base=Source(name, digests_of(self.base, read)),
            revision=self.base.name if self.base.parent.name == "snapshots" else None,
            base_tensors={name: BaseTensor(e.dtype, e.shape, weights.base[name]) for name, e in entries.items()},
            delta=delta,
            tokenizer=name_of_tokenizer(self.tokenizer),
            vocabulary=plan.kept.new_ids.vocabulary,
            rows=rows,
            options=self.options,
            cut=weights.cut,
            written={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
            versions=_versions(),
        )

    def _proof(self, folder: Path, vocabulary: PartialVocabulary, proving: _Proving) -> "Proof":
        """The proof that a folder, which has not appeared yet, holds what it should; raises `CheckpointError` where it does not.

        A delta is merged for it, into a folder that goes again.
        """
        from transformers import AutoTokenizer

        from leanvocab.trimming.proof import prove

        tokenizer = self.tokenizer
        if isinstance(tokenizer, str | os.PathLike):
            tokenizer = AutoTokenizer.from_pretrained(folder_at(tokenizer, "base"))
        with contextlib.ExitStack() as stack:
            full = self.base
            if self.delta is not None:
                full = stack.enter_context(sibling(self.target.with_name(f"{self.target.name}.full"))) / "model"
                rounding = self.options.allow_rounding
                merge_checkpoint(base=self.base, delta=self.delta, output=full, allow_rounding=rounding, progress=False)
            proof = prove(
                full,
                folder,
                vocabulary,
                proving.texts,
                columns=proving.columns,
                language_column=proving.language_column,
                tokenizer=tokenizer,
            )
        if not proof.holds:
            wrong = [name for name, output in proof.outputs.items() if not output.holds]
            raise CheckpointError(
                f"the trimmed checkpoint is discarded, since its proof does not hold: {proof.num_wrong:,} covered texts are "
                f"split otherwise ({'; '.join(proof.wrong_texts)}), outputs that differ: {', '.join(wrong) or 'none'}"
            )
        return proof

    def _put(self, folder: Path) -> bool:
        """Puts the folder where it belongs; False where the same lies there already."""
        try:
            (swap if self.overwrite else put)(folder, self.target)
        except FileExistsError:
            if unlike := _first_unlike(folder, self.target):
                raise CheckpointError(_OCCUPIED.format(target=self.target, reason=f"{unlike} differs")) from None
            return False
        return True

    def _result(
        self,
        inputs: _Inputs,
        plan: TrimmedPlan,
        files: Mapping[str, bytes],
        rows: Rows,
        is_new: bool,
        proof: "Proof | None",
        started: float,
    ) -> TrimResult:
        num_rows = inputs.model.full_size
        of_tokenizer = () if inputs.tokenizer is None else tuple(sorted(files.keys() - inputs.model.configs.keys()))
        unwritten = () if inputs.tokenizer is None else inputs.tokenizer.names - files.keys()
        return TrimResult(
            output=self.target,
            rows_before=num_rows,
            rows_after=plan.kept.new_ids.size(num_rows),
            rows_for_model=rows.for_model,
            rows_for_splits=rows.for_splits,
            rows_of_padding=rows.padding,
            bytes_before=inputs.weights.num_bytes,
            bytes_after=plan.num_bytes,
            tensors=tuple(tensor.source.name for file in plan.files for tensor in file.tensors if tensor.dims),
            tokenizer_files=of_tokenizer,
            left_out=(*inputs.side_files.left_out, *sorted(unwritten)),
            already_there=not is_new,
            proof=proof,
            seconds=time.perf_counter() - started,
        )


def _folders(
    base: str | os.PathLike[str], delta: str | os.PathLike[str] | None, recipe: Recipe | None
) -> tuple[Path, Path | None]:
    """(base, delta); raises `CheckpointError` where each is what the other should be, or one is something else."""
    if delta is not None:
        return base_and_delta(base, delta)
    folder = folder_at(base, "base", None if recipe is None else recipe.revision)
    if is_delta(folder):
        raise CheckpointError(f"the base {folder} is a delta; name the base first, and the delta after it (delta=…)")
    if is_entry(folder / "adapter_config.json"):
        raise CheckpointError(
            f"{folder} is an adapter of peft, expected a checkpoint: PeftModel.from_pretrained(base, adapter)"
            ".merge_and_unload() gives the whole model"
        )
    return folder, None


def _dims(inputs: _Inputs, kept: KeptRows) -> dict[str, tuple[int, ...]]:
    cut = inputs.model.trimmed_tensors(inputs.merged.shapes, kept.new_ids)
    return {name: tensor.dims for name, tensor in cut.items()}


def _new_files(inputs: _Inputs, kept: KeptRows) -> dict[str, bytes]:
    """Files that hold ids or sizes, written anew: configs, and the tokenizer's."""
    of_tokenizer = {} if inputs.tokenizer is None else inputs.tokenizer.written(kept.new_ids.vocabulary.token_ids)
    return inputs.model.written(kept.new_ids) | of_tokenizer


def _versions() -> dict[str, str]:
    versions = {"leanvocab": __version__}
    for package in ("tokenizers", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _first_unlike(folder: Path, other: Path) -> str | None:
    """A file that two folders do not both have, byte for byte; recipes may name their sources in other words."""
    names = [{str(p.relative_to(top)) for p in top.rglob("*") if not is_folder(p)} for top in (folder, other)]
    if odd := sorted(names[0] ^ names[1]):
        return odd[0]
    both = sorted(names[0] - {RECIPE})
    return next((name for name in both if not filecmp.cmp(folder / name, other / name, shallow=False)), None)
