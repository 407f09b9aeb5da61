"""Deltas into shrunk models, in memory: same vocabulary, or with the rows of both."""

import os
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from leanvocab.checkpoints.base_checkpoint import Base, find_base
from leanvocab.checkpoints.delta_format import DeltaTable, Description, read_delta
from leanvocab.checkpoints.delta_saving import tables_of
from leanvocab.checkpoints.merge_plan import Changes, make_plan
from leanvocab.checkpoints.tensor_names import TensorNames, names_when_saved
from leanvocab.errors import CheckpointError, LeanVocabWarning, NotShrunkError
from leanvocab.files.headers import Located
from leanvocab.files.tensor_files import read_rows, read_tensor
from leanvocab.model.full_table import LOOKUPS
from leanvocab.model.growing import extend_
from leanvocab.model.shrink import partial_state_dicts
from leanvocab.model.status import status
from leanvocab.partial.module import PartialModule, partial_modules
from leanvocab.partial.partial_table import PartialTable


def load_delta(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    widen: bool = False,
) -> nn.Module:
    """Gives a shrunk model what a delta holds, in place: kept rows, the other trained tensors, and the base's for the rest.

    A matrix that the delta carries whole (an output layer that was trained in full, decayed rows) loads whole, its other rows
    into the model's store. Rows that were trained for another objective load with a warning.

    With `widen` a model that was shrunk to another vocabulary gets the delta's rows beside its own first, as one with
    on_missing="extend" does in any case. Optimizer states are not loaded here (`leanvocab.trainers.resuming.resume_from_delta`).

    Raises:
        NotShrunkError: the model is not shrunk.
        CheckpointError: the delta has another vocabulary, the model another base, or names do not match; nothing has changed.
    """
    folder = Path(os.path.realpath(directory))
    description, file = read_delta(folder)
    source = find_base(model, base if base is not None else description.base_name)
    changes = Changes({name: (file, entry) for name, entry in file.tensors.items()}, description)
    make_plan(source.weights, changes, allow_rounding=True)  # checks that delta and base fit one another
    paths = paths_of_tables(model, description)
    check_vocabularies(model, description, paths, widen)
    _check_rest(model, paths, description, source)
    state = _other_tensors(model, source, changes, paths)
    warn_of_another_mode(model, description)
    if widen or any(_shrunk(model, path).table.arrivals is not None for path in paths.values()):
        widen_tables(model, description, paths)
    tables = {name: _shrunk(model, path).table for name, path in paths.items()}
    for name, path in paths.items():
        base_tensor = source.weights.tensors[description.tensors[name].replaces[0]]
        state[f"{path}.weight"] = _rows_for(
            tables[name], description.tables[name], read_tensor(file, name), base_tensor
        )
    with partial_state_dicts(model):
        for table in tables_of(model).keys() - tables.values():
            table.gives_partial_state_dicts = False
        loaded = model.load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys
    return model


def _check_rest(model: nn.Module, paths: dict[str, str], description: Description, base: Base) -> None:
    """Raises `CheckpointError` where the rows outside the vocabulary are others than those that the delta was made from."""
    for name, path in paths.items():
        delta, targets = description.tables[name], list(description.tensors[name].replaces)
        if not base.holds_rest_of(_shrunk(model, path).table, targets):
            raise CheckpointError(
                f"{path}: its rows outside the vocabulary are not those of {base.folder}, which the delta was made from"
            )
        if base.rest_sha256(delta.vocabulary, targets) != delta.rest_sha256:
            raise CheckpointError(f"{base.folder}: {name!r}: other rows than in the base that the delta was made from")


def check_vocabularies(model: nn.Module, description: Description, paths: dict[str, str], widen: bool) -> None:
    """Raises `CheckpointError` where a model's vocabulary is not the delta's, unless it is to be widened."""
    for name, path in paths.items():
        own, wanted = _shrunk(model, path).table.vocabulary, description.tables[name].vocabulary
        if own.full_size != wanted.full_size:
            raise CheckpointError(
                f"{path}: expected a table of {own.full_size:,} rows, found a delta of one of {wanted.full_size:,}"
            )
        grows = _shrunk(model, path).table.arrivals is not None
        if own != wanted and not (widen or grows):
            raise CheckpointError(
                f"{path}: the delta's rows are of another vocabulary: expected digest {own.digest[:16]}… ({len(own):,} ids), "
                f"found {wanted.digest[:16]}… ({len(wanted):,} ids). Shrink to the delta's vocabulary, or take both: widen=True"
            )


def paths_of_tables(model: nn.Module, description: Description) -> dict[str, str]:
    """Name of each table of a delta → path of the shrunk module in the model."""
    shrunk = partial_modules(model)
    if not shrunk:
        raise NotShrunkError(
            f"{type(model).__name__} is not shrunk; shrink_(model, vocabulary) first, or make a checkpoint: leanvocab merge"
        )
    paths, own = {}, {saved: name for name, saved in names_when_saved(model).items()}
    for name in description.tables:
        names = {name, *description.tensors[name].replaces}
        names |= {own[saved] for saved in names if saved in own}
        holders = [path for path in shrunk if any(f".{name}".endswith(f".{path}.weight") for name in names)]
        if not holders:
            shown = ", ".join(shrunk)
            if description.output != "full":
                option = f'output="{description.output}"'
                shown += f"; the delta was trained with {option}: shrink_(model, vocabulary, {option})"
                shown += ", or make a checkpoint: leanvocab merge"
            raise CheckpointError(f"expected a shrunk table for {name!r}, found {shown}")
        paths[name] = next((path for path in holders if isinstance(shrunk[path], LOOKUPS)), holders[0])
    return paths


def warn_of_another_mode(model: nn.Module, description: Description) -> None:
    """Warns where a model is shrunk for another objective: rows are rows, but that should not change without a word."""
    own, theirs = status(model).output or "full", description.output
    if own != theirs:
        warnings.warn(
            f'the delta was trained with output="{theirs}", {type(model).__name__} is shrunk with output="{own}": its rows '
            "load as they are, and training goes on with the other objective",
            LeanVocabWarning,
            stacklevel=3,
        )


def _shrunk(model: nn.Module, path: str) -> PartialModule:
    module = model.get_submodule(path)
    assert isinstance(module, PartialModule)
    return module


def widen_tables(model: nn.Module, description: Description, paths: dict[str, str]) -> None:
    """Gives a model's tables the rows of a delta's vocabularies beside their own, in place."""
    extend_(model, {path: description.tables[name].vocabulary.token_ids.tolist() for name, path in paths.items()})


def _rows_for(table: PartialTable, delta: DeltaTable, rows: Tensor, base: Located) -> Tensor:
    """The delta's rows in the order of the model's vocabulary; the base's for ids that the delta does not have."""
    token_ids, theirs = table.token_ids, torch.tensor(delta.vocabulary.token_ids, device="cpu")
    wanted = torch.empty(len(token_ids), *rows.shape[1:], dtype=rows.dtype, device="cpu")
    inside = torch.isin(token_ids, theirs)
    wanted[inside] = rows[torch.searchsorted(theirs, token_ids[inside])]
    file, entry = base
    with file.opened() as source:
        for position in (~inside).nonzero()[:, 0].tolist():
            wanted[position] = read_rows(source, entry, int(token_ids[position]), 1)[0].to(rows.dtype)
    return wanted


def _other_tensors(model: nn.Module, base: Base, changes: Changes, paths: dict[str, str]) -> dict[str, Tensor]:
    """Every tensor of the model but the tables at `paths`: the delta's where it has it, the base's elsewhere; ties once."""
    covered = {_shrunk(model, path).table for path in paths.values()}
    whole = {table: path for table, path in tables_of(model).items() if table not in covered}
    tables = {f"{path}.weight" for path, module in partial_modules(model).items() if path != whole.get(module.table)}
    names = TensorNames(model, base.weights.shapes)
    with torch.no_grad():
        saved = model.state_dict(keep_vars=True)
    wanted = [name for name in names.own if name in saved and name not in tables]
    state = {name: _tensor(names.ties[name], names, base, changes) for name in wanted}
    for name, tensor in state.items():
        if tensor.shape != saved[name].shape:
            raise CheckpointError(f"{name}: expected the shape {tuple(saved[name].shape)}, found {tuple(tensor.shape)}")
    return state


def _tensor(ties: list[str], names: TensorNames, base: Base, changes: Changes) -> Tensor:
    """A tensor of the model, by any of its names, from the delta or else from the base."""
    target = next((target for target in map(names.in_base, ties) if target is not None), "")
    source = next((name for name in ties if name in changes.tensors), changes.sources.get(target))
    if source is not None:
        return read_tensor(changes.tensors[source][0], source)
    if target:
        return read_tensor(base.weights.tensors[target][0], target)
    raise CheckpointError(
        f"{ties[0]}: expected it in the delta or in its base, found it in neither; make a checkpoint: leanvocab merge"
    )
