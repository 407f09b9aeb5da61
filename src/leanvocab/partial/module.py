"""Modules that hold a partial matrix, be they input tables or output layers: what they have in common.

The module object is kept. Its weight becomes partial, and its class one with ours under the original class in the order of
inheritance, so that subclasses with a forward of their own keep it. State dicts stay full, by torch's public hooks.
"""

import sys
import weakref
from collections.abc import Iterable, Iterator, Set
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from leanvocab.errors import BypassError, CheckpointError
from leanvocab.files.row_store import take_rows
from leanvocab.partial.attachments import keep_hooks
from leanvocab.partial.gradient_hooks import serve_hooks
from leanvocab.partial.growth import rows_of
from leanvocab.partial.missing import MissingNote, running_model
from leanvocab.partial.partial_table import PartialTable
from leanvocab.partial.sharded import is_sharded, share_of, whole

_GATHERING = (
    "get_layer_state_dict"  # DeepSpeed's function that puts a state dict of ZeRO-3's weights together, around our hooks
)
DIGEST_KEY = "leanvocab_digest"  # in the metadata of a partial state dict: which vocabulary its rows belong to

# Both hold what they know weakly, so that nothing of a model is left here once it is gone, its classes included.
_partial_classes: "weakref.WeakValueDictionary[tuple[type, type], type[PartialModule]]" = weakref.WeakValueDictionary()
_shrunk_modules: "weakref.WeakSet[PartialModule]" = weakref.WeakSet()


def shrunk_modules() -> "Iterator[PartialModule]":
    """Every module with a partial matrix that is alive in this process, deep copies and unpickled ones included."""
    return iter(list(_shrunk_modules))


def partial_modules(model: nn.Module) -> "dict[str, PartialModule]":
    """The modules of a model that hold partial matrices, by their paths; none where it is not shrunk."""
    return {path: module for path, module in model.named_modules() if isinstance(module, PartialModule)}


def raise_missing(modules: "Iterable[PartialModule]") -> None:
    """Raises the error of an id that was noted on a device as missing. Ids and labels of one batch are one error."""
    errors = [error for module in modules if (error := module.missing_error()) is not None]
    if errors:
        raise errors[0]


class PartialModule(nn.Module):
    """A module whose `weight` holds the rows of a partial vocabulary, [len(vocabulary), dim]; `switch_class` makes it."""

    kind: ClassVar[type["PartialModule"]]
    original_class: ClassVar[type[nn.Module]] = nn.Module
    own_attributes: ClassVar[tuple[str, ...]] = ("table", "missing")  # what `restore_class` takes away
    weight: Tensor
    table: PartialTable
    missing: MissingNote

    def settle_on_device(self) -> None:
        """Sets up what depends on the device, at first and after the module was moved."""
        device = torch.device("cpu") if self.weight.is_meta else self.weight.device
        if "missing" in self.__dict__:
            self.missing.to(device)
        else:
            self.missing = MissingNote(device)

    @property
    def rows(self) -> Tensor:
        """The rows [len(vocabulary), dim] of now, as a tensor that stays right in a graph when others come."""
        if self.table.arrivals is None or not torch.is_grad_enabled() or not self.weight.requires_grad:
            return self.weight
        return rows_of(self.weight, self.table)  # type: ignore[arg-type]

    def rows_changed(self) -> None:
        """Makes anew what depends on which rows are there."""
        self.drop_caches()
        self.settle_on_device()

    def missing_error(self) -> IndexError | None:
        """The error of an id that was noted on the device as missing since the last call."""
        noted = self.missing.take()
        return None if noted is None else self.error_of(*noted)

    def drop_caches(self) -> None:
        """Lets go of what is made again when it is needed."""

    def error_of(self, position: int, token_id: int) -> IndexError:
        """The error of a missing id at a flat position."""
        raise NotImplementedError

    def is_trained_with(self, parameters: Set[int]) -> bool:
        """True where a step on the parameters of these ids trains the model that the module ran in.

        Of a model that trains nothing, nobody knows which optimizer's it is; DeepSpeed's hold copies of its parameters.
        """
        if id(self.weight) in parameters:
            return True
        model = self.missing.model or self
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return not trainable or any(id(each) in parameters or _has_copies(each) for each in trainable)

    def begin(self) -> None:
        """Begins a forward of the module: raises what an earlier one noted, where no model runs around it to do so."""
        if torch.compiler.is_exporting() or torch.jit.is_tracing() or is_fx_symbolic_tracing():  # type: ignore[attr-defined]
            self.__prepare_scriptable__()
        self.check_length()
        if not torch.compiler.is_compiling():
            self.table.take_writes()
            self.missing.model = running_model()
            if self.missing.model is None:
                raise_missing([self])

    def __prepare_scriptable__(self) -> None:
        """Refuses to become a file that knows the kept rows alone; torch.jit.script asks by this name."""
        raise BypassError(
            f"{self.table.name}: what is exported (torch.export, torch.jit, torch.fx, ONNX) would be shrunk to a partial "
            "vocabulary and fail on ids outside it; call merge_(model) first, then export"
        )

    def check_length(self) -> None:
        """Raises `BypassError` where something has put another weight in place, or runs copies of the module in threads."""
        if "_is_replica" in self.__dict__:
            raise BypassError(
                f"{self.table.name}: nn.DataParallel runs copies of the model in threads, which share what a partial vocabulary "
                "notes of missing ids. Start one process a GPU (torchrun, accelerate launch), or let the process see one GPU: "
                "CUDA_VISIBLE_DEVICES=0"
            )
        refuse_computed(self)
        if self.weight.shape[0] != self.table.num_rows:
            raise BypassError(_wrong_length(self.table, self.weight.shape[0]))

    def reset_parameters(self) -> None:
        """Refuses to draw the kept rows anew, as `nn.Embedding` and `nn.Linear` do with all rows."""
        raise BypassError(
            f"{self.table.name}: new random weights would be those of the kept rows alone; call merge_(model) first, initialize, "
            "and shrink again"
        )

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters, with all rows for what DeepSpeed's ZeRO-3 saves: it asks each module for its parameters alone."""
        named = super().named_parameters(*args, **kwargs)
        if hasattr(self._parameters.get("weight"), "ds_id") and sys._getframe(1).f_code.co_name == _GATHERING:
            return ((name, _full_for_zero3(self, parameter)) for name, parameter in named)
        return named

    def _apply(self, fn: Any, recurse: bool = True) -> "PartialModule":
        self.table.take_writes()
        before = self.weight.data_ptr()
        super()._apply(fn, recurse)
        if self.weight.data_ptr() != before:  # ordinary state dicts hold the memory of before, too
            self.table.pass_over_writes(forget=True)
        self.table.cast(self.weight.dtype)
        if not self.weight.is_meta:  # what is no parameter moves with the weight, and survives a detour over meta
            self.settle_on_device()
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        self.table.take_writes()
        return _new_module, (self.kind, self.original_class), dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        serve_hooks(self.weight, self.table)
        _shrunk_modules.add(self)


def _has_copies(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def partial_class(kind: type[PartialModule], original: type[nn.Module]) -> type[PartialModule]:
    """The class `original` with `kind` under it: one for each pair, so that types compare equal."""
    known = _partial_classes.get((kind, original))
    if known is not None:
        return known
    plain = kind.__bases__[-1]  # RemapEmbedding under ScaledEmbedding is a RemapScaledEmbedding
    name = kind.__name__.removesuffix(plain.__name__) + original.__name__
    members = {"original_class": original, "kind": kind, "__module__": kind.__module__, "__doc__": kind.__doc__}
    made = type(name, (kind,) if original is plain else (original, kind), members)
    _partial_classes[kind, original] = made
    return made


def switch_class(
    module: nn.Module, kind: type[PartialModule], table: PartialTable, weight: nn.Parameter
) -> PartialModule:
    """Makes `module` one that holds the partial `weight` [len(vocabulary), dim], in place."""
    module.__class__ = partial_class(kind, type(module))
    assert isinstance(module, PartialModule)
    module._parameters["weight"] = weight
    module.table = table
    keep_hooks(
        module,
        module.register_state_dict_post_hook(_give_full_rows),
        module.register_load_state_dict_pre_hook(_take_partial_rows),
        module.register_load_state_dict_post_hook(_serve_new_weight),
    )
    module.settle_on_device()
    _shrunk_modules.add(module)
    return module


def restore_class(module: PartialModule, weight: nn.Parameter) -> None:
    """Makes `module` what it was before `switch_class`, its hooks aside: in place, weight [full_size, dim]."""
    _shrunk_modules.discard(module)
    for name in module.own_attributes:
        module.__dict__.pop(name, None)
    module._parameters["weight"] = weight
    module.__class__ = module.original_class  # type: ignore[assignment]


def _new_module(kind: type[PartialModule], original: type[nn.Module]) -> PartialModule:
    cls = partial_class(kind, original)
    return cls.__new__(cls)


def refuse_computed(module: PartialModule) -> None:
    """Raises where the weight is computed of other parameters (pruning, weight norm, parametrizations), of kept rows alone."""
    own = module._parameters
    if "weight" not in own and (
        "parametrizations" in module._modules or any(name.startswith("weight_") for name in own)
    ):
        raise BypassError(
            f"{module.table.name}: its weight is computed now (torch.nn.utils.prune, weight_norm, parametrize), from the kept "
            "rows alone, and what is saved would have those alone too. Undo that (prune.remove, remove_parametrizations), call "
            "merge_(model), and then prune or parametrize the full weight"
        )


def _wrong_length(table: PartialTable, num_rows: int) -> str:
    return (
        f"{table.name}: the weight has {num_rows:,} rows, expected the {table.num_rows:,} of the partial vocabulary; something "
        "replaced it while the model was shrunk. Call merge_(model) first, then change the table, then shrink again "
        "(for torch.func.functional_call take the state dict within partial_state_dicts(model))"
    )


# --- state dicts ------------------------------------------------------------------------------------------------------


def _give_full_rows(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """After `state_dict()`: the full rows in place of the partial ones."""
    key = f"{prefix}weight"
    if not isinstance(module, PartialModule):
        return
    refuse_computed(module)
    if key not in state_dict:
        return
    table, weight = module.table, state_dict[key]
    if weight.numel() == 0 and _is_taken_away(module.weight):
        return
    if weight.shape[0] != table.num_rows:
        raise BypassError(_wrong_length(table, weight.shape[0]))
    if table.gives_partial_state_dicts:
        table.take_writes()
        local_metadata[DIGEST_KEY] = table.vocabulary.digest
        return
    if weight.is_meta:
        full = torch.empty(table.full_size, weight.shape[1], dtype=weight.dtype, device="meta")
    else:
        full = table.view_for(state_dict, whole(weight))
    is_kept = weight is module.weight and not weight.is_meta  # keep_vars=True
    share = share_of(full, weight)
    state_dict[key] = given = nn.Parameter(share, requires_grad=weight.requires_grad) if is_kept else share
    if share is full and not weight.is_meta:
        table.gave(given, module.weight)


def _full_for_zero3(module: PartialModule, parameter: Any) -> nn.Parameter:
    """All rows where the parameter is the weight, in one that ZeRO-3 knows by the same number, as it knows ties."""
    table = module.table
    if parameter is not module.weight or parameter.numel() == 0 or table.gives_partial_state_dicts:
        return parameter  # type: ignore[no-any-return]
    full: Any = nn.Parameter(table.full_rows(parameter), requires_grad=parameter.requires_grad)
    full.ds_id = parameter.ds_id  # type: ignore[attr-defined]
    return full  # type: ignore[no-any-return]


def _is_taken_away(weight: Tensor) -> bool:
    """True where ZeRO-3 holds the rows elsewhere at the moment: an ordinary state dict has an empty tensor then, too."""
    return weight.numel() == 0 and hasattr(weight, "ds_status")


def _take_partial_rows(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any
) -> None:
    """Before `load_state_dict()`: the kept rows of a full matrix; a partial one as it is, if it is of this vocabulary."""
    key = f"{prefix}weight"
    if not isinstance(module, PartialModule) or key not in state_dict:
        return
    table, value = module.table, state_dict[key]
    if value.numel() == 0 and _is_taken_away(module.weight):
        return
    table.pass_over_writes()
    digest = metadata.get(DIGEST_KEY)
    if digest is not None or (value.shape[0] == table.num_rows and value.shape[0] != table.full_size):
        _check_partial(table, key, value, digest)
    elif value.shape[0] == table.full_size:
        full = whole(value).detach()
        if not full.is_meta:
            table.adopt(full, module.weight.dtype)
        state_dict[key] = share_of(take_rows(full, table.token_ids), module.weight)
    else:
        raise CheckpointError(
            f"{key}: expected {table.full_size:,} rows (the full vocabulary), found {value.shape[0]:,}; "
            "load a checkpoint of this model, or merge_(model) first"
        )


def _serve_new_weight(module: nn.Module, incompatible_keys: Any) -> None:
    """After `load_state_dict(…, assign=True)`, which puts another parameter in place."""
    if isinstance(module, PartialModule) and not is_sharded(module.weight):
        serve_hooks(module.weight, module.table)


def _check_partial(table: PartialTable, key: str, value: Tensor, digest: str | None) -> None:
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
