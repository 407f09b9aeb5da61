"""Delta checkpoints: the trained rows and the other trained tensors alone, with all that says where they belong.

What a model saves is the model's own `save_pretrained` with partial rows; names, ties and conversions are as ever. What
equals the base is left out, which the base's digests prove. `layout` says what lies on disk, `merge` makes it full.
"""

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leanvocab.checkpoints.checkpoint import written_whole
from leanvocab.checkpoints.delta_format import (
    CONFIG,
    FILES,
    MODEL_CONFIG,
    TENSORS,
    BaseTensor,
    DeltaTable,
    DeltaTensor,
    Description,
    read_delta,
    write_signs,
)  # fmt: skip
from leanvocab.checkpoints.merge_plan import Partial, make_plan, read_partial
from leanvocab.checkpoints.optimizer_states import write_states
from leanvocab.checkpoints.verify import rest_sha256
from leanvocab.choices import FrozenRowsOn, OutputMode
from leanvocab.errors import CheckpointError, LeanVocabWarning, ModelError, NotShrunkError
from leanvocab.files.copying import copy_range, sha256_of_range
from leanvocab.files.headers import (
    SINGLE,
    SafetensorsFile,
    TensorEntry,
    Weights,
    is_weights_file,
    make_header,
    opened,
    read_header,
    read_weights,
)
from leanvocab.files.row_bytes import gaps
from leanvocab.files.row_store import same_bits
from leanvocab.files.tensors import TORCH_DTYPES, read_rows, read_tensor
from leanvocab.model.shrink import merge_, shrink_
from leanvocab.model.status import status
from leanvocab.partial.module import PartialModule, partial_modules
from leanvocab.partial.partial_table import PartialTable
from leanvocab.partial.sharded import is_sharded
from leanvocab.progress import ProgressBar
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

_BLOCK_ROWS_BYTES = 8 << 20
_known_digests: dict[tuple[Any, ...], str] = {}  # (file, what) → digest: a training run saves many deltas to one base


def save_delta(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    tensors: Literal["changed", "all"] = "changed",
    optimizer: Optimizer | None = None,
    progress: bool | None = None,
) -> Path:
    """Saves the kept rows and the other trained tensors of a shrunk model in `directory`, whole or not at all.

    The folder is for leanvocab alone: `merge_checkpoint` (or `leanvocab merge`) makes a full checkpoint of it and the base.
    Rows outside the vocabulary that are not the base's (decay of unused rows, say) are carried too: then that table is whole.

    Args:
        base: the checkpoint that the model came from; by default what the model's config names, or its rows come from.
        tensors: "changed" leaves out tensors that equal the base's; "all" keeps all but the tables' other rows.
        optimizer: one whose states are saved too, partial, for resuming.
        progress: a bar with bytes for digests of the base; by default on a terminal, when it takes long.

    Raises:
        NotShrunkError: the model is not shrunk.
        CheckpointError: there is no base, or the model does not come from it, or `directory` holds weights.
        OSError: it cannot be written. In each case nothing has changed.
    """
    source = find_base(model, base)
    target = Path(os.path.realpath(directory))
    if target == source.folder or (target.is_dir() and any(is_weights_file(each) for each in os.listdir(target))):
        raise CheckpointError(
            f"{target} holds weights of a full checkpoint, which a delta would not replace; name another folder"
        )
    with written_whole(target, keeps=lambda name: name not in FILES) as (folder, _):
        write_delta(model, folder, source, tensors=tensors, optimizer=optimizer, progress=progress)
    return target


@dataclass(frozen=True)
class Base:
    """The checkpoint that a model came from: its folder, and how the user calls it."""

    name: str
    revision: str | None
    folder: Path
    weights: Weights


def find_base(model: nn.Module | None, base: str | os.PathLike[str] | None = None) -> Base:
    """The base of a model on this machine: a folder, or a hub name that is in the cache; raises `CheckpointError`."""
    config = getattr(model, "config", None)
    name = os.fspath(base) if base is not None else getattr(config, "_name_or_path", None) or ""
    revision = getattr(config, "_commit_hash", None) if base is None else None
    if not name:
        shrunk = {} if model is None else partial_modules(model)
        stores = [module.table.store for module in shrunk.values()]
        name = next((os.path.dirname(store.path) for store in stores if not store.temporary), "")
    if not name:
        raise CheckpointError(
            f"{type(model).__name__} does not say which checkpoint it came from: name it, base='folder' (a model that was made "
            "from a config is saved with save_full first)"
        )
    folder = Path(name) if os.path.isdir(name) else _in_hub_cache(name, revision)
    folder = Path(os.path.realpath(folder))
    return Base(name, revision, folder, read_weights(folder))


def _in_hub_cache(name: str, revision: str | None) -> Path:
    try:
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
    except Exception as error:  # the hub's errors have no common base
        raise CheckpointError(
            f"the base {name!r} is no folder here and not in the hub's cache; say where it lies: base='folder'"
        ) from error


# --- writing ----------------------------------------------------------------------------------------------------------


def write_delta(
    model: nn.Module,
    folder: Path,
    base: Base,
    *,
    tensors: str = "changed",
    optimizer: Optimizer | None = None,
    progress: bool | None = None,
) -> None:
    """Writes the files of a delta into `folder`, which is fresh."""
    tables = _tables(model)
    _check_can_be_saved(model, tables, tensors)
    entries = base.weights.tensors
    bar = ProgressBar("digests of the base", base.weights.num_bytes, progress)
    base_tensors = {
        name: BaseTensor(entry.dtype, entry.shape, _digest(file, entry, bar.add))
        for name, (file, entry) in entries.items()
    }
    bar.close()
    names = _Names(model, base.weights)
    whole = {
        id(table) for table, path in tables.items() if not _rest_is_the_base(table, names.table(path), model, base)
    }
    for table in tables:
        if id(table) in whole and table.decay is None:
            warnings.warn(
                f"{table.name}: rows outside the vocabulary differ from those of {base.folder}, so that this table is carried "
                "whole; if the model comes from another checkpoint, name it: base='folder'",
                LeanVocabWarning,
                stacklevel=2,
            )
    with _partial_rows(table for table in tables if id(table) not in whole):
        parts = _save_parts(model, folder)
    saved = read_header(parts, SINGLE)
    kept = {names.on_disk(path, saved): table for table, path in tables.items() if id(table) not in whole}
    matched = names.match(saved, kept)
    wanted = [
        n
        for n in saved.tensors
        if n in kept or tensors == "all" or not _is_the_base(saved, n, matched[n], base.weights)
    ]
    digests = _write_tensors(saved, wanted, folder / TENSORS)
    Description(
        base_name=base.name,
        base_revision=base.revision,
        base_tensors=base_tensors,
        tables={
            name: DeltaTable(each.vocabulary, _rest(each.vocabulary, matched[name], base.weights))
            for name, each in kept.items()
        },
        tensors={name: DeltaTensor(tuple(matched[name]), digests[name]) for name in wanted},
        absent=tuple(
            name for name in entries if name not in {each for targets in matched.values() for each in targets}
        ),
        renamed=names.renamed,
        output=(mode := status(model).output or "full"),
        decay_unused_rows=any(table.decay is not None for table in tables),
    ).write(folder)
    if (parts / CONFIG).exists():
        os.replace(parts / CONFIG, folder / MODEL_CONFIG)
    shutil.rmtree(parts)
    if optimizer is not None:
        write_states(optimizer, folder, _table_parameters(model, kept))
    write_signs(folder, base.name, mode)


def _tables(model: nn.Module) -> dict[PartialTable, str]:
    """PartialTable → path of the first module that holds it, an input table where there is one."""
    tables: dict[PartialTable, str] = {}
    for path, module in sorted(
        partial_modules(model).items(), key=lambda found: not isinstance(found[1], nn.Embedding)
    ):
        tables.setdefault(module.table, path)
    return tables


def _check_can_be_saved(model: nn.Module, tables: dict[PartialTable, str], tensors: str) -> None:
    if tensors not in ("changed", "all"):
        raise ModelError(f"tensors={tensors!r}: expected 'changed' or 'all'")
    if not tables:
        raise NotShrunkError(
            f"{type(model).__name__} is not shrunk, so that nothing says which rows were trained; call shrink_ first"
        )
    check_not_sharded(model)
    if hasattr(model, "peft_config"):
        raise ModelError(
            "a model with adapters saves those by itself; merge them first (merge_and_unload) for a delta of the model"
        )


def check_not_sharded(model: nn.Module) -> None:
    """Raises `ModelError` where other processes hold some of the rows: deltas are written by one."""
    sharded = next((name for name, each in model.named_parameters() if is_sharded(each)), None)
    if sharded is not None:
        raise ModelError(
            f"{sharded}: its rows are sharded over processes, and one process writes a delta; save full checkpoints, in shares "
            "(torch.distributed.checkpoint) or put together (get_model_state_dict with StateDictOptions(full_state_dict=True))"
        )


def _table_parameters(model: nn.Module, kept: dict[str, PartialTable]) -> dict[int, tuple[str, PartialTable]]:
    names = {id(table): name for name, table in kept.items()}
    modules = [each for each in partial_modules(model).values() if id(each.table) in names]
    return {id(each.weight): (names[id(each.table)], each.table) for each in modules}


@contextlib.contextmanager
def _partial_rows(tables: Iterable[PartialTable]) -> Iterator[None]:
    chosen = list(tables)
    before = [table.gives_partial_state_dicts for table in chosen]
    for table in chosen:
        table.gives_partial_state_dicts = True
    try:
        yield
    finally:
        for table, value in zip(chosen, before, strict=True):
            table.gives_partial_state_dicts = value


def _save_parts(model: nn.Module, folder: Path) -> Path:
    """What the model itself saves, in one file."""
    parts = folder / "parts"
    parts.mkdir()
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(parts, max_shard_size=1 << 62)  # type: ignore[operator]
    else:
        from safetensors.torch import save_model

        save_model(model, str(parts / SINGLE), metadata={"format": "pt"})
    return parts


def _write_tensors(saved: SafetensorsFile, wanted: list[str], path: Path) -> dict[str, str]:
    """Writes those tensors of a file into another, in their order, and returns their digests."""
    raw, starts = make_header({"format": "pt"}, ((n, saved.tensors[n].dtype, saved.tensors[n].shape) for n in wanted))
    digests = {}
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.pwrite(target, raw, 0)
        with opened(saved.path.parent, saved.path.name) as source:
            for name in wanted:
                entry = saved.tensors[name]
                copy_range(source, entry.start, target, starts[name], entry.num_bytes)
                digests[name] = sha256_of_range(source, entry.start, entry.end)
        os.fsync(target)
    finally:
        os.close(target)
    return digests


# --- what is the base's -----------------------------------------------------------------------------------------------


def _digest(file: SafetensorsFile, entry: TensorEntry, count: Callable[[int], None] = lambda _: None) -> str:
    with opened(file.path.parent, file.path.name) as source:
        key = (*_identity(source), entry)
        if key not in _known_digests:
            _known_digests[key] = sha256_of_range(source, entry.start, entry.end)
    count(entry.num_bytes)
    return _known_digests[key]


def _identity(descriptor: int) -> tuple[int, ...]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _rest(vocabulary: PartialVocabulary, targets: list[str], weights: Weights) -> str:
    """The digest of the base's rows outside the vocabulary."""
    digests = set()
    for target in targets:
        file, entry = weights.tensors[target]
        with opened(file.path.parent, file.path.name) as source:
            key = (*_identity(source), entry, vocabulary.digest)
            if key not in _known_digests:
                _known_digests[key] = rest_sha256(source, entry, vocabulary.token_ids)
        digests.add(_known_digests[key])
    if len(digests) != 1:
        raise CheckpointError(
            f"{weights.folder}: {' and '.join(targets)} are one table in the model, expected one content in the "
            f"base, found {len(digests)}"
        )
    return digests.pop()


def _rest_is_the_base(table: PartialTable, targets: list[str], model: nn.Module, base: Base) -> bool:
    """Whether the rows outside the vocabulary are the base's, as the model's dtype holds them."""
    if not targets:
        raise CheckpointError(
            f"{base.folder}: expected the table {table.name}.weight, found none: the model does not come from it"
        )
    table.settle_decay()
    file, entry = base.weights.tensors[targets[0]]
    if entry.shape[0] != table.full_size:
        raise CheckpointError(
            f"{file.path}: tensor {entry.name!r}: expected {table.full_size:,} rows, found {entry.shape[0]:,}"
        )
    with opened(file.path.parent, file.path.name) as source:
        if table.dtype == table.store.dtype and table.store.is_region_of(source, entry.start):
            return True
        step = max(1, _BLOCK_ROWS_BYTES // max(1, entry.row_bytes))
        for first, count in gaps(table.vocabulary.token_ids, table.full_size):
            for start in range(first, first + count, step):
                num_rows = min(step, first + count - start)
                rows = table.base_rows(torch.arange(start, start + num_rows))
                if not same_bits(rows, read_rows(source, entry, start, num_rows).to(rows.dtype)):
                    return False
    return True


def _is_the_base(saved: SafetensorsFile, name: str, targets: list[str], weights: Weights) -> bool:
    if not targets:
        return False
    for target in targets:
        file, entry = weights.tensors[target]
        if entry.dtype == saved.tensors[name].dtype:
            if _digest(file, entry) != _digest(saved, saved.tensors[name]):
                return False
        elif not same_bits(
            read_tensor(file, target).to(TORCH_DTYPES[saved.tensors[name].dtype]), read_tensor(saved, name)
        ):
            return False
    return True


class _Names:
    """Which tensors of the base a model's tensors are: by name, with or without the prefix that a head puts before it, or by
    the name that transformers saves it under."""

    def __init__(self, model: nn.Module, base: Weights):
        self.base, self.renamed = base.tensors, dict[str, str]()
        self.prefix = getattr(model, "base_model_prefix", "") + "."
        groups: dict[int, list[str]] = {}
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ):
            groups.setdefault(id(tensor), []).append(name)
        self.ties = {name: group for group in groups.values() for name in group}
        self.saved_as = _names_when_saved(model)
        self.ties |= {saved: self.ties[name] for name, saved in self.saved_as.items() if name in self.ties}

    def table(self, path: str) -> list[str]:
        """The base's names for the table of the module at `path`."""
        return [each for each in map(self.in_base, self.ties[f"{path}.weight"]) if each is not None]

    def on_disk(self, path: str, saved: SafetensorsFile) -> str:
        """The name under which the model saved that table."""
        names = self.ties[f"{path}.weight"]
        found = [name for name in (*names, *(self.saved_as.get(each, "") for each in names)) if name in saved.tensors]
        if not found:
            raise ModelError(
                f"{path}.weight: the model saves this table under another name, which a delta cannot hold; use save_full"
            )
        return found[0]

    def match(self, saved: SafetensorsFile, tables: Container[str]) -> dict[str, list[str]]:
        """Saved name → the base's names (ties: several), none where it is new; fills `renamed`. `tables` hold rows alone."""
        matched: dict[str, list[str]] = {}
        taken: set[str] = set()
        for name, entry in saved.tensors.items():
            targets = []
            for own in [name, *(each for each in self.ties.get(name, []) if each != name)]:
                found = self.in_base(own)
                if found is not None and found not in taken and self.base[found][1].shape[1:] == entry.shape[1:]:
                    taken.add(found)
                    targets.append(found)
                    if found != own:
                        self.renamed[found] = own
            if targets and name not in tables and self.base[targets[0]][1].shape != entry.shape:
                taken.difference_update(targets)  # a head of another size: new, and the base's leaves
                for each in targets:
                    self.renamed.pop(each, None)
                targets = []
            matched[name] = targets
        return matched

    def in_base(self, name: str) -> str | None:
        shorter = name.removeprefix(self.prefix) if self.prefix != "." else name
        for each in (name, shorter, f"{self.prefix}{name}", self.saved_as.get(name, name)):
            if each in self.base:
                return each
        return None


def _names_when_saved(model: nn.Module) -> dict[str, str]:
    """Name of a tensor → the name in its checkpoint, where transformers renames it when it loads (GPT-NeoX's output layer)."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # it has been renaming since 5.0
        return {}
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        return {}
    witnesses = {name: torch.empty(each.shape, device="meta") for name, each in model.named_parameters()}
    try:
        saved = revert_weight_conversion(model, dict(witnesses))  # type: ignore[arg-type]
    except Exception:  # a conversion that looks at values: those tensors are merged or split, not renamed
        return {}
    names = {id(each): name for name, each in saved.items()}
    found = ((name, names.get(id(each), name)) for name, each in witnesses.items())
    return {name: saved for name, saved in found if saved != name}


# --- loading ----------------------------------------------------------------------------------------------------------


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

    With `widen` a model that was shrunk to another vocabulary is shrunk to the union of both first, in the mode that it has;
    build the optimizer after that. Optimizer states are not loaded here (`leanvocab.trainer.resume_from_delta`).

    Raises:
        NotShrunkError: the model is not shrunk.
        CheckpointError: the delta has another vocabulary, the model another base, or names do not match; nothing has changed.
    """
    folder = Path(os.path.realpath(directory))
    said, file = read_delta(folder)
    source = find_base(model, base if base is not None else said.base_name)
    partial = read_partial(folder, None, source.weights)
    make_plan(source.weights, partial, allow_rounding=True)  # checks that delta and base fit one another
    paths = paths_of_tables(model, said)
    check_vocabularies(model, said, paths, widen)
    for name, path in paths.items():
        table = _shrunk(model, path).table
        if not _rest_is_the_base(table, list(said.tensors[name].replaces), model, source):
            raise CheckpointError(
                f"{path}: its rows outside the vocabulary are not those of {source.folder}, which the delta was made from"
            )
        if (
            _rest(said.tables[name].vocabulary, list(said.tensors[name].replaces), source.weights)
            != said.tables[name].rest_sha256
        ):
            raise CheckpointError(
                f"{source.folder}: {name!r}: other rows than in the base that the delta was made from"
            )
    state = _state(model, source, said, file, partial, paths)
    warn_of_another_mode(model, said)
    if widen:
        widen_tables(model, said, paths)
    for name, path in paths.items():
        state[f"{path}.weight"] = _rows_for(
            _shrunk(model, path).table, said.tables[name], read_tensor(file, name), source, said, name
        )
    with _partial_rows(_shrunk(model, path).table for path in paths.values()):
        found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    return model


def check_vocabularies(model: nn.Module, said: Description, paths: dict[str, str], widen: bool) -> None:
    """Raises `CheckpointError` where a model's vocabulary is not the delta's, unless it is to be widened."""
    for name, path in paths.items():
        own, wanted = _shrunk(model, path).table.vocabulary, said.tables[name].vocabulary
        if own.full_size != wanted.full_size:
            raise CheckpointError(
                f"{path}: expected a table of {own.full_size:,} rows, found a delta of one of {wanted.full_size:,}"
            )
        if own != wanted and not widen:
            raise CheckpointError(
                f"{path}: the delta's rows are of another vocabulary: expected digest {own.digest[:16]}… ({len(own):,} ids), "
                f"found {wanted.digest[:16]}… ({len(wanted):,} ids). Shrink to the delta's vocabulary, or take both: widen=True"
            )


def paths_of_tables(model: nn.Module, said: Description) -> dict[str, str]:
    """Name of each table of a delta → path of the shrunk module in the model."""
    shrunk = partial_modules(model)
    if not shrunk:
        raise NotShrunkError(
            f"{type(model).__name__} is not shrunk; shrink_(model, vocabulary) first, or make a checkpoint: leanvocab merge"
        )
    paths, saved_as = {}, _names_when_saved(model)
    own = {saved: name for name, saved in saved_as.items()}
    for name in said.tables:
        names = {name, *said.tensors[name].replaces}
        names |= {own[each] for each in names if each in own}
        found = [
            path
            for path in shrunk
            if f"{path}.weight" in names or any(each.endswith(f".{path}.weight") for each in names)
        ]
        if not found:
            mode = (
                ""
                if said.output == "full"
                else f'; the delta was trained with output="{said.output}": '
                + (f'shrink_(model, vocabulary, output="{said.output}"), or make a checkpoint: leanvocab merge')
            )
            raise CheckpointError(f"expected a shrunk table for {name!r}, found {', '.join(shrunk)}{mode}")
        paths[name] = next((path for path in found if isinstance(shrunk[path], nn.Embedding)), found[0])
    return paths


def warn_of_another_mode(model: nn.Module, said: Description) -> None:
    """Rows are rows, but what they were trained for should not change without a word."""
    mode = status(model).output or "full"
    if mode != said.output:
        warnings.warn(
            f'the delta was trained with output="{said.output}", {type(model).__name__} is shrunk with output="{mode}": its rows '
            "load as they are, and training goes on with the other objective",
            LeanVocabWarning,
            stacklevel=3,
        )


def _shrunk(model: nn.Module, path: str) -> PartialModule:
    module = model.get_submodule(path)
    assert isinstance(module, PartialModule)
    return module


def widen_tables(model: nn.Module, said: Description, paths: dict[str, str]) -> None:
    """Shrinks a model to the union of its vocabularies and a delta's, in place and in the mode that it has."""
    tables = _tables(model)
    vocabularies = {path: table.vocabulary for table, path in tables.items()}
    for name, path in paths.items():
        own = tables[_shrunk(model, path).table]
        vocabularies[own] |= said.tables[name].vocabulary
    if all(table.vocabulary == vocabularies[path] for table, path in tables.items()):
        return
    options, mode = next(iter(tables)), status(model).output
    place: FrozenRowsOn = "host" if any(table.frozen_rows_on == "host" for table in tables) else "device"
    merge_(model)
    shrink_(
        model,
        vocabularies,
        output=cast(OutputMode | None, mode),
        frozen_rows=place,
        on_missing=options.on_missing,
        decay_unused_rows=options.decay is not None,
        store_dir=options.store_dir,
    )


def _rows_for(table: PartialTable, delta: DeltaTable, rows: Tensor, base: Base, said: Description, name: str) -> Tensor:
    """The delta's rows in the order of the model's vocabulary; the base's for ids that the delta does not have."""
    ids = table.token_ids
    theirs = torch.tensor(delta.vocabulary.token_ids)
    wanted = torch.empty(len(ids), *rows.shape[1:], dtype=rows.dtype)
    inside = torch.isin(ids, theirs)
    wanted[inside] = rows[torch.searchsorted(theirs, ids[inside])]
    file, _ = base.weights.tensors[said.tensors[name].replaces[0]]
    with opened(file.path.parent, file.path.name) as source:
        entry = base.weights.tensors[said.tensors[name].replaces[0]][1]
        for place in (~inside).nonzero()[:, 0].tolist():
            wanted[place] = read_rows(source, entry, int(ids[place]), 1)[0].to(rows.dtype)
    return wanted


def _state(
    model: nn.Module, base: Base, said: Description, file: SafetensorsFile, partial: Partial, paths: dict[str, str]
) -> dict[str, Tensor]:
    """Every other tensor of the model: the delta's where it has it, the base's elsewhere; whole matrices once."""
    covered = {_shrunk(model, path).table for path in paths.values()}
    whole = {table: path for table, path in _tables(model).items() if table not in covered}
    tables = {f"{path}.weight" for path, each in partial_modules(model).items() if path != whole.get(each.table)}
    names = _Names(model, base.weights)
    state: dict[str, Tensor] = {}
    own = [
        name
        for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    ]
    with torch.no_grad():
        saved = model.state_dict(keep_vars=True)
    for name in own:
        if name in tables or name not in saved:
            continue
        source = next((each for each in names.ties[name] if each in said.tensors), None)
        target = next((each for each in map(names.in_base, names.ties[name]) if each is not None), None)
        source = source or (partial.sources.get(target) if target is not None else None)
        if source is not None:
            state[name] = read_tensor(file, source)
        elif target is not None:
            state[name] = read_tensor(base.weights.tensors[target][0], target)
        else:
            raise CheckpointError(
                f"{name}: expected it in the delta or in its base, found it in neither; make a checkpoint: leanvocab merge"
            )
        if state[name].shape != saved[name].shape:
            raise CheckpointError(
                f"{name}: expected the shape {tuple(saved[name].shape)}, found {tuple(state[name].shape)}"
            )
    return state
