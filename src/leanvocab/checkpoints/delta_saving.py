"""Delta checkpoints: the trained rows and the other trained tensors alone, with all that says where they belong.

The model's own `save_pretrained` writes them from a partial state dict without what is the base's, so that names, ties and
conversions are as ever (docs/decisions/deltas.md).
"""

import os
import shutil
import warnings
from collections.abc import Container
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from leanvocab.checkpoints.base_checkpoint import Base, find_base
from leanvocab.checkpoints.delta_format import (
    CONFIG,
    FILES,
    MODEL_CONFIG,
    TENSORS,
    BaseTensor,
    DeltaTable,
    DeltaTensor,
    Description,
    write_signs,
)  # fmt: skip
from leanvocab.checkpoints.full_saving import write_model
from leanvocab.checkpoints.optimizer_states import write_states
from leanvocab.checkpoints.tensor_names import TensorNames, as_saved
from leanvocab.errors import CheckpointError, LeanVocabWarning, ModelError, NotShrunkError
from leanvocab.files.atomic_folders import written_whole
from leanvocab.files.copying import sha256_of_range
from leanvocab.files.headers import SINGLE, is_weights_file, read_header
from leanvocab.files.presence import is_folder, is_there
from leanvocab.files.row_store import same_bits
from leanvocab.files.tensor_files import DTYPE_NAMES, read_tensor, sha256_of_tensor
from leanvocab.model.full_table import LOOKUPS
from leanvocab.model.shrink import partial_state_dicts
from leanvocab.model.status import status
from leanvocab.partial.module import partial_modules
from leanvocab.partial.partial_table import PartialTable
from leanvocab.partial.sharded import first_sharded


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
    if target == source.folder or (is_folder(target) and any(map(is_weights_file, os.listdir(target)))):
        raise CheckpointError(
            f"{target} holds weights of a full checkpoint, which a delta would not replace; name another folder"
        )
    with written_whole(target, keeps=lambda name: name not in FILES) as (folder, _):
        write_delta(model, folder, source, tensors=tensors, optimizer=optimizer, progress=progress)
    return target


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
    tables = _tables_to_save(model, tensors)
    base_tensors = base.tensors(progress)
    names = TensorNames(model, base.weights.shapes)
    of_rows = _tables_of_rows(tables, names, base)
    with partial_state_dicts(model):
        for table in tables.keys() - of_rows.keys():
            table.gives_partial_state_dicts = False
        matched, unchanged = _compare(model, names, of_rows, base, base_tensors)
        _save_tensors(model, folder, unchanged if tensors == "changed" else ())
    file = read_header(folder, TENSORS)
    kept = {names.on_disk(path, file.tensors): table for table, path in of_rows.items()}
    with file.opened() as source:
        digests = {name: sha256_of_range(source, entry.start, entry.end) for name, entry in file.tensors.items()}
    in_model = {target for targets in matched.values() for target in targets}
    mode = status(model).output or "full"
    Description(
        base_name=base.name,
        base_revision=base.revision,
        base_tensors=base_tensors,
        tables={
            name: DeltaTable(table.vocabulary, base.rest_sha256(table.vocabulary, matched[name]))
            for name, table in kept.items()
        },
        tensors={name: DeltaTensor(tuple(matched.get(name, ())), digest) for name, digest in digests.items()},
        absent=tuple(name for name in base_tensors if name not in in_model),
        renamed=names.renamed,
        output=mode,
        decay_unused_rows=any(table.decay is not None for table in tables),
    ).write(folder)
    if optimizer is not None:
        write_states(optimizer, folder, _table_parameters(model, kept))
    write_signs(folder, base.name, mode)


def tables_of(model: nn.Module) -> dict[PartialTable, str]:
    """Table → path of the first module that holds it, an input table where there is one."""
    tables: dict[PartialTable, str] = {}
    modules = sorted(partial_modules(model).items(), key=lambda named: not isinstance(named[1], LOOKUPS))
    for path, module in modules:
        tables.setdefault(module.table, path)
    return tables


def _tables_to_save(model: nn.Module, tensors: str) -> dict[PartialTable, str]:
    """The tables of a model, which is checked first: `ModelError`, `NotShrunkError`."""
    tables = tables_of(model)
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
    return tables


def check_not_sharded(model: nn.Module) -> None:
    """Raises `ModelError` where other processes hold some of the rows: deltas are written by one."""
    sharded = first_sharded(model)
    if sharded is not None:
        raise ModelError(
            f"{sharded}: its rows are sharded over processes, and one process writes a delta; save full checkpoints, in shares "
            "(torch.distributed.checkpoint) or put together (get_model_state_dict with StateDictOptions(full_state_dict=True))"
        )


def _tables_of_rows(tables: dict[PartialTable, str], names: TensorNames, base: Base) -> dict[PartialTable, str]:
    """The tables whose kept rows say all: their other rows are the base's. The rest are carried whole."""
    of_rows = {table: path for table, path in tables.items() if base.holds_rest_of(table, names.table(path))}
    for table in tables:
        if table not in of_rows and table.decay is None:
            warnings.warn(
                f"{table.name}: rows outside the vocabulary differ from those of {base.folder}, so that this table is carried "
                "whole; if the model comes from another checkpoint, name it: base='folder'",
                LeanVocabWarning,
                stacklevel=4,
            )
    return of_rows


def _compare(
    model: nn.Module,
    names: TensorNames,
    tables: dict[PartialTable, str],
    base: Base,
    base_tensors: dict[str, BaseTensor],
) -> tuple[dict[str, list[str]], set[str]]:
    """(saved name → the base's names for it, the model's names of what is the base's) of a model's state dict."""
    state: dict[str, Any] = model.state_dict()
    saved = as_saved(model, state)
    of_rows = {names.on_disk(path, saved) for path in tables.values()}
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items() if isinstance(tensor, Tensor)}
    matched = names.match(shapes, of_rows)
    same = {id(matched[name]): False for name in of_rows}  # tied tensors share the list of their names in the base
    for name, targets in matched.items():
        if id(targets) not in same:
            same[id(targets)] = bool(targets) and _is_the_base(saved[name], targets, base, base_tensors)
    unchanged = {name for name, targets in matched.items() if same[id(targets)]}
    saved_names = {id(tensor): name for name, tensor in saved.items()}
    own = {name: saved_names[id(tensor)] for name, tensor in state.items() if id(tensor) in saved_names}
    left_out = {name for name, saved_name in own.items() if saved_name in unchanged}
    if saved.keys() - set(own.values()) <= unchanged:  # what saving merges or splits, all of it or nothing
        left_out |= state.keys() - own.keys()
    return matched, left_out


def _is_the_base(tensor: Tensor, targets: list[str], base: Base, base_tensors: dict[str, BaseTensor]) -> bool:
    """True where a tensor is the base's in each place, as the tensor's dtype holds it."""
    if tensor.is_meta:
        return False
    for target in targets:
        file, entry = base.weights.tensors[target]
        if entry.dtype == DTYPE_NAMES.get(tensor.dtype):
            if sha256_of_tensor(tensor) != base_tensors[target].sha256:
                return False
        elif not same_bits(read_tensor(file, target).to(tensor.dtype), tensor):
            return False
    return True


def _save_tensors(model: nn.Module, folder: Path, left_out: Container[str]) -> None:
    """Writes what the model itself saves, in one file, without some tensors of its state dict; and its config."""

    def leave_out(_: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        for name in [name for name in state if name.removeprefix(prefix) in left_out]:
            del state[name]

    saved = folder / "saved"
    saved.mkdir()
    hook = model.register_state_dict_post_hook(leave_out)
    try:
        write_model(model, saved, {"max_shard_size": 1 << 62} if hasattr(model, "save_pretrained") else {})
    finally:
        hook.remove()
    os.replace(saved / SINGLE, folder / TENSORS)
    if is_there(saved / CONFIG):
        os.replace(saved / CONFIG, folder / MODEL_CONFIG)
    shutil.rmtree(saved)


def _table_parameters(model: nn.Module, kept: dict[str, PartialTable]) -> dict[int, tuple[str, PartialTable]]:
    names = {table: name for name, table in kept.items()}
    modules = [module for module in partial_modules(model).values() if module.table in names]
    return {id(module.weight): (names[module.table], module.table) for module in modules}
