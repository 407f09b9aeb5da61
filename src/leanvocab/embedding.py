"""An nn.Embedding whose lookup remaps: `weight[remap[ids]]`. Ids outside it stay full, so nothing else changes.

The module object is kept. Its weight becomes partial, its class one with `RemapEmbedding` under the original class in
the order of inheritance, so that subclasses that scale or normalise in a forward of their own keep doing so.
"""

import warnings
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from leanvocab.errors import BypassError, CheckpointError, LeanVocabWarning, MissingTokenError
from leanvocab.rows import RowStore, take_rows
from leanvocab.table import Table

DIGEST_KEY = "leanvocab_digest"  # in the metadata of a partial state dict: which vocabulary its rows belong to

_remapping_classes: "dict[type[nn.Embedding], type[RemapEmbedding]]" = {}
_shrunk_modules: "weakref.WeakSet[RemapEmbedding]" = weakref.WeakSet()


def shrunk_modules() -> "Iterator[RemapEmbedding]":
    """Every shrunk embedding module that is alive in this process, deep copies and unpickled ones included."""
    return iter(list(_shrunk_modules))


class RemapEmbedding(nn.Embedding):
    """An embedding that holds the rows of a partial vocabulary and is asked for full ids.

    Input: token ids of any shape (int32 or int64); output [..., dim], bit for bit what the full table gives. `weight` is
    [len(vocabulary), dim]; `num_embeddings` and `padding_idx` stay those of the full table. Made by `switch_class`.

    In training mode an id outside the vocabulary raises `MissingTokenError`: on CPU at once; elsewhere before the next
    optimizer step, since looking at a device's values waits for the device (until then its row reads NaN).
    """

    original_class: ClassVar[type[nn.Embedding]] = nn.Embedding
    table: Table
    _remap: Tensor  # int64 [full_size + 2]: partial id of each id + 1, or -1; one more at each end for ids out of range
    _missing: Tensor  # int64 [3] on the weight's device: whether, at which flat position, and which id was missing
    _partial_padding_idx: int | None
    _noted = False  # whether a lookup left it to the device to notice
    _state_hooks: list[RemovableHandle]
    _arrival: Any = None  # (pinned copy of _missing, CUDA event that says when it has arrived)

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.shape[0] != self.table.num_rows:
            raise BypassError(_wrong_length(self.table, self.weight.shape[0]))
        partial_ids = self._partial_ids(input)
        missing = partial_ids < 0
        policy = self.table.on_missing or ("error" if self.training else "base")
        if policy == "error" and (input.device.type != "cpu" or torch.compiler.is_compiling()):
            return self._lookup_and_note(input, partial_ids, missing)
        if not missing.any():
            return self._lookup(partial_ids)
        if policy == "error":
            raise self._missing_token_error(input, int(missing.flatten().nonzero()[0]))
        served: Tensor = self._lookup_with_base_rows(input, partial_ids, missing)
        return served

    def _partial_ids(self, input: Tensor) -> Tensor:
        if self.table.ids == "partial":
            return input.where((input >= 0) & (input < self.table.num_rows), -1)
        if self._remap.device != input.device:
            self._remap = self._remap.to(input.device)
        partial_ids: Tensor = self._remap[(input + 1).clamp_(0, self.table.full_size + 1)]
        return partial_ids

    def _lookup(self, partial_ids: Tensor) -> Tensor:
        return F.embedding(
            partial_ids,
            self.weight,
            self._partial_padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )

    def _lookup_and_note(self, input: Tensor, partial_ids: Tensor, missing: Tensor) -> Tensor:
        """Looks up without waiting for the device; a missing id is noted there and its row reads NaN, with no gradient."""
        self._noted = True
        if input.numel() > 0:
            position = missing.flatten().long().argmax(0, keepdim=True)
            # index_select, since indexing with a scalar tensor would wait for its value
            token_id = input.flatten().index_select(0, position).long()
            note = torch.cat([missing.any().long().view(1), position, token_id])
            if self._missing.device != note.device:
                self._missing = self._missing.to(note.device)
            self._missing.copy_(torch.where(self._missing[0] > 0, self._missing, note))
            if note.device.type == "cuda" and not torch.compiler.is_compiling():
                self._send_note()
        return self._lookup(partial_ids.clamp(min=0)).masked_fill(missing.unsqueeze(-1), float("nan"))

    def _send_note(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            return
        if self._arrival is None:
            self._arrival = torch.empty(3, dtype=torch.int64, pin_memory=True), torch.cuda.Event()
        note, event = self._arrival
        note.copy_(self._missing, non_blocking=True)
        event.record()

    def raise_if_missing(self) -> None:
        """Raises `MissingTokenError` for an id that was missing since the last call; waits for that forward alone."""
        if not self._noted:
            return
        if self._arrival is not None:
            note, event = self._arrival
            event.synchronize()
        else:
            note = self._missing
        found, position, token_id = note.tolist()
        if found:
            self._missing.zero_()
            self._arrival = None
            raise MissingTokenError(self._describe(token_id, f"flat position {position} of the input"))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _lookup_with_base_rows(self, input: Tensor, partial_ids: Tensor, missing: Tensor) -> Tensor:
        outside = input[missing]
        limit = self.table.full_size if self.table.ids == "full" else 0
        if bool(((outside < 0) | (outside >= limit)).any()):
            wrong = missing & ((input < 0) | (input >= limit))
            raise self._missing_token_error(input, int(wrong.flatten().nonzero()[0]))
        known = self._lookup(partial_ids[~missing])
        output = known.new_empty(*input.shape, known.shape[-1])
        output[~missing] = known
        rows = self.table.base_rows(outside).to(known.device, known.dtype)
        if self.max_norm is not None:
            rows = F.embedding(torch.arange(len(rows), device=rows.device), rows, None, self.max_norm, self.norm_type)
        output[missing] = rows
        self._count_served(len(rows), int(outside[0]))
        return output

    def _count_served(self, num_served: int, first_id: int) -> None:
        if self.table.num_served == 0:
            warnings.warn(
                f"{self.table.name}: ids outside the partial vocabulary, the first of them "
                f"{self.table.vocabulary.describe(first_id)}, are served from the base; status(model) counts them",
                LeanVocabWarning,
                stacklevel=2,
            )
        self.table.num_served += num_served

    def _missing_token_error(self, input: Tensor, flat_position: int) -> MissingTokenError:
        position = tuple(int(index) for index in torch.unravel_index(torch.tensor(flat_position), input.shape))
        where = f"position {position if len(position) != 1 else position[0]} of the input"
        return MissingTokenError(self._describe(int(input.flatten()[flat_position]), where))

    def _describe(self, token_id: int, where: str) -> str:
        table = self.table
        if table.ids == "partial":
            return (
                f"{table.name}: id {token_id} at {where} is not a partial id: expected 0 … {table.num_rows - 1}, since the "
                'model was shrunk with ids="partial"; give it the data set that vocabulary.remap_dataset made'
            )
        if not 0 <= token_id < table.full_size:
            return (
                f"{table.name}: id {token_id} at {where} is no token id: expected 0 … {table.full_size - 1}; "
                "check the tokenizer, and that ignored labels (-100) do not reach the embedding"
            )
        return (
            f"{table.name}: token {table.vocabulary.describe(token_id)} at {where} is outside the partial vocabulary "
            f"({table.num_rows:,} of {table.full_size:,} rows); count the data that it comes from too, keep it with "
            'PartialVocabulary.from_counts(…, always_keep=[…]), or shrink with on_missing="base" to read its row from the base'
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "RemapEmbedding":
        super()._apply(fn, recurse)
        self.table.cast(self.weight.dtype)
        if (
            not self.weight.is_meta
        ):  # the map is no parameter: it moves with the weight, and survives a detour over meta
            self._remap = self._remap.to(self.weight.device)
            self._missing = self._missing.to(self.weight.device)
            self._arrival = None
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rows={self.table.num_rows}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_module, (self.original_class,), {**self.__dict__, "_arrival": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _shrunk_modules.add(self)


def remapping_class(original: type[nn.Embedding]) -> type[RemapEmbedding]:
    """The class `original` with its lookup remapped: one per original class, so that types compare equal."""
    if original not in _remapping_classes:
        bases = (RemapEmbedding,) if original is nn.Embedding else (original, RemapEmbedding)
        name = "RemapEmbedding" if original is nn.Embedding else f"Remap{original.__name__}"
        members = {"original_class": original, "__module__": __name__, "__doc__": RemapEmbedding.__doc__}
        _remapping_classes[original] = type(name, bases, members)
    return _remapping_classes[original]


def switch_class(module: nn.Embedding, table: Table, weight: nn.Parameter) -> RemapEmbedding:
    """Makes `module` remap its lookup: in place, weight [len(vocabulary), dim]."""
    original = type(module)
    module.__class__ = remapping_class(original)
    assert isinstance(module, RemapEmbedding)
    module._parameters["weight"] = weight
    module.table = table
    device = torch.device("cpu") if weight.is_meta else weight.device
    remap = torch.full((table.full_size + 2,), -1, dtype=torch.int64)
    remap[table.token_ids + 1] = torch.arange(table.num_rows)
    padding = -1 if module.padding_idx is None else int(remap[module.padding_idx + 1])
    module._remap = remap.to(device)
    module._partial_padding_idx = None if padding < 0 else padding
    module._missing = torch.zeros(3, dtype=torch.int64, device=device)
    module._state_hooks = [
        module.register_state_dict_post_hook(_give_full_rows),
        module.register_load_state_dict_pre_hook(_take_partial_rows),
    ]
    _shrunk_modules.add(module)
    return module


def restore_class(module: RemapEmbedding, weight: nn.Parameter) -> None:
    """Makes `module` what it was before `switch_class`: in place, weight [full_size, dim]."""
    for handle in module._state_hooks:
        handle.remove()
    _shrunk_modules.discard(module)
    for name in ("table", "_remap", "_missing", "_partial_padding_idx", "_noted", "_arrival", "_state_hooks"):
        module.__dict__.pop(name, None)
    module._parameters["weight"] = weight
    module.__class__ = module.original_class  # type: ignore[assignment]


def _new_module(original: type[nn.Embedding]) -> RemapEmbedding:
    cls = remapping_class(original)
    return cls.__new__(cls)


def _wrong_length(table: Table, found: int) -> str:
    return (
        f"{table.name}: the weight has {found:,} rows, expected the {table.num_rows:,} of the partial vocabulary; something "
        "replaced it while the model was shrunk. Call merge_(model) first, then change the table, then shrink again "
        "(for torch.func.functional_call take the state dict within partial_state_dicts(model))"
    )


# --- state dicts ------------------------------------------------------------------------------------------------------


def _give_full_rows(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """After `state_dict()`: the full rows in place of the partial ones."""
    key = f"{prefix}weight"
    if not isinstance(module, RemapEmbedding) or key not in state_dict:
        return
    table, weight = module.table, state_dict[key]
    if weight.shape[0] != table.num_rows:
        raise BypassError(_wrong_length(table, weight.shape[0]))
    if table.gives_partial_state_dicts:
        local_metadata[DIGEST_KEY] = table.vocabulary.digest
        return
    if hasattr(weight, "full_tensor"):
        raise CheckpointError(
            f"{key}: the partial rows are sharded over processes, so that no process can write the full rows alone; "
            "take the state dict within partial_state_dicts(model), or gather the model first"
        )
    if weight.is_meta:
        state_dict[key] = torch.empty(table.full_size, weight.shape[1], dtype=weight.dtype, device="meta")
    elif weight is module.weight:  # keep_vars=True
        state_dict[key] = nn.Parameter(table.view_for(state_dict, weight), requires_grad=weight.requires_grad)
    else:
        state_dict[key] = table.view_for(state_dict, weight)


def _take_partial_rows(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any
) -> None:
    """Before `load_state_dict()`: the kept rows of a full matrix; a partial one as it is, if it is of this vocabulary."""
    key = f"{prefix}weight"
    if not isinstance(module, RemapEmbedding) or key not in state_dict:
        return
    table, value = module.table, state_dict[key]
    digest = metadata.get(DIGEST_KEY)
    if digest is not None or (value.shape[0] == table.num_rows and value.shape[0] != table.full_size):
        _check_partial(table, key, value, digest)
    elif value.shape[0] == table.full_size:
        if not value.is_meta:
            _adopt_other_rows(table, value, module.weight)
        state_dict[key] = take_rows(value.detach(), table.token_ids)
    else:
        raise CheckpointError(
            f"{key}: expected {table.full_size:,} rows (the full vocabulary), found {value.shape[0]:,}; "
            "load a checkpoint of this model, or merge_(model) first"
        )


def _check_partial(table: Table, key: str, value: Tensor, digest: str | None) -> None:
    if digest is None and not table.gives_partial_state_dicts:
        raise CheckpointError(
            f"{key}: found {value.shape[0]:,} rows, as many as the partial vocabulary has, but nothing says that they are of "
            f"this vocabulary; expected {table.full_size:,} rows, or a partial state dict with its metadata. "
            "If they are of this vocabulary, load them within partial_state_dicts(model)"
        )
    if digest not in (None, table.vocabulary.digest):
        raise CheckpointError(
            f"{key}: the partial rows are of another vocabulary: expected digest {table.vocabulary.digest[:16]}…, "
            f"found {str(digest)[:16]}…; load the full state dict, which fits every vocabulary"
        )
    if value.shape[0] != table.num_rows:
        raise CheckpointError(f"{key}: expected {table.num_rows:,} partial rows, found {value.shape[0]:,}")


def _adopt_other_rows(table: Table, value: Tensor, weight: Tensor) -> None:
    """Rows outside the vocabulary that differ from the store's are the model's from now on, as ordinary loading has it."""
    table.settle_decay()
    value = value.detach()
    if table.dtype != table.store.dtype or table.store.differs(value, table.token_ids):
        if value.dtype == weight.dtype:
            table.replace_store(RowStore.of(value, table.token_ids, table.store_dir))
        else:
            table.replace_store(RowStore.copy(value.to(weight.dtype), table.store_dir))
