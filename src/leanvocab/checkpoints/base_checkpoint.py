"""The base of a shrunk model: the checkpoint that it came from, found on this machine and compared with what the model holds."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leanvocab.checkpoints.delta_format import BaseTensor
from leanvocab.checkpoints.verify import rest_sha256
from leanvocab.errors import CheckpointError
from leanvocab.files.copying import BLOCK_BYTES, sha256_of_range
from leanvocab.files.headers import Located, Weights, read_weights
from leanvocab.files.hub_cache import cached_folder
from leanvocab.files.presence import is_folder
from leanvocab.files.row_bytes import gaps
from leanvocab.files.row_store import same_bits
from leanvocab.files.tensor_files import read_rows
from leanvocab.partial.module import partial_modules
from leanvocab.partial.partial_table import PartialTable
from leanvocab.progress import ProgressBar
from leanvocab.reads.caches import emptied_with_models
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

_MOST_DIGESTS = 100_000
# By file and content: a training run saves many deltas to one base.
_known_digests: dict[tuple[Any, ...], str] = emptied_with_models({})


@dataclass(frozen=True)
class Base:
    """The checkpoint that a model came from: its folder, and how the user calls it."""

    name: str
    revision: str | None
    folder: Path
    weights: Weights

    def tensors(self, progress: bool | None = None) -> dict[str, BaseTensor]:
        """Its tensors with their digests; a bar with bytes is shown as `progress` says."""
        bar = ProgressBar("digests of the base", self.weights.num_bytes, progress)
        tensors = {}
        for name, located in self.weights.tensors.items():
            entry = located[1]
            tensors[name] = BaseTensor(entry.dtype, entry.shape, _digest(located))
            bar.add(entry.num_bytes)
        bar.close()
        return tensors

    def rest_sha256(self, vocabulary: PartialVocabulary, names: list[str]) -> str:
        """The digest of its rows outside a vocabulary; `names` are one table in the model, and must be one here."""
        digests = {_digest(self.weights.tensors[name], vocabulary) for name in names}
        if len(digests) != 1:
            raise CheckpointError(
                f"{self.folder}: {' and '.join(names)} are one table in the model, expected one content in the "
                f"base, found {len(digests)}"
            )
        return digests.pop()

    def holds_rest_of(self, table: PartialTable, names: list[str]) -> bool:
        """True where the table's rows outside the vocabulary are the base's, as the model's dtype holds them."""
        if not names:
            raise CheckpointError(
                f"{self.folder}: expected the table {table.name}.weight, found none: the model does not come from it"
            )
        table.settle()
        file, entry = self.weights.tensors[names[0]]
        if entry.shape[0] != table.full_size:
            raise CheckpointError(
                f"{file.path}: tensor {entry.name!r}: expected {table.full_size:,} rows, found {entry.shape[0]:,}; if "
                "tokens were added, save the resized model (save_pretrained) before it is shrunk, and name that folder: "
                "base='folder'"
            )
        with file.opened() as source:
            if table.dtype == table.store.dtype and table.store.is_region_of(source, entry.start):
                return True
            most = BLOCK_BYTES // max(1, entry.row_bytes)
            for first, num_rows in gaps(table.vocabulary.token_ids, table.full_size, most):
                rows = table.base_rows(torch.arange(first, first + num_rows, device="cpu"))
                if not same_bits(rows, read_rows(source, entry, first, num_rows).to(rows.dtype)):
                    return False
        return True


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
    there = Path(name) if is_folder(name) else cached_folder(name, revision)
    if there is None:
        raise CheckpointError(
            f"the base {name!r} is no folder here and not in the hub's cache; say where it lies: base='folder'"
        )
    folder = Path(os.path.realpath(there))
    return Base(name, revision, folder, read_weights(folder))


def _digest(located: Located, outside: PartialVocabulary | None = None) -> str:
    """The sha256 of a tensor, or of its rows outside a vocabulary; not computed again while its file stays as it is."""
    file, entry = located
    with file.opened() as source:
        status = os.fstat(source)
        identity = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        key = (*identity, entry, None if outside is None else outside.digest)
        if key not in _known_digests:
            if len(_known_digests) >= _MOST_DIGESTS:
                _known_digests.clear()
            if outside is None:
                _known_digests[key] = sha256_of_range(source, entry.start, entry.end)
            else:
                _known_digests[key] = rest_sha256(source, entry, outside.token_ids)
    return _known_digests[key]
