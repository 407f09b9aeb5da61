"""Refusals: why a model, a vocabulary or options cannot be shrunk with, found before anything changes."""

import numpy as np
import torch
from torch import Tensor, nn

from leanvocab.choices import FROZEN_ROWS_ON, OUTPUT_MODES
from leanvocab.errors import RESIZE_FIRST, BypassError, ModelError, OptimizerError, TiedOutputError, VocabularyError
from leanvocab.model.full_table import LOOKUPS, FullTable, Lookup, ask, has_forward_of_its_own, num_ids_of
from leanvocab.model.input_tables import per_layer_modules
from leanvocab.model.trainable_tokens import LAYER, WRAPPER, check_tokens
from leanvocab.partial.growth import refuse_where_rows_cannot_come
from leanvocab.partial.module import PartialModule
from leanvocab.partial.sharded import is_sharded
from leanvocab.reads.function_source import functions_in, names_of
from leanvocab.reads.weight_reads import reads_of
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

_QUANTIZED = {"Params4bit", "Int8Params"}  # bitsandbytes' parameters
_FUNCTIONS = {
    nn.Embedding: "embedding",
    nn.EmbeddingBag: "embedding_bag",
    nn.Linear: "linear",
}  # of torch.nn.functional


def check_table(model: nn.Module, table: FullTable) -> None:
    """Raises what `find_tables` does where a matrix cannot be partial, with the vocabulary and in the mode that it has."""
    for path, module in zip(table.paths, table.modules, strict=True):
        check_module(path, module)
    _check_size(table)
    _check_padding(table)
    _check_ties(model, table)
    _check_kept_elsewhere(model, table)
    _check_wrappers(model, table)
    _check_not_cast(model, table)
    _check_reads(model, table)


def check_module(path: str, module: Lookup | nn.Linear) -> None:
    """Raises where a module's weight, or its own forward, cannot be partial."""
    weight = module._parameters.get("weight")
    if weight is None:
        raise ModelError(f"{path}: its weight is computed (parametrized), and has no rows to take; remove that first")
    if is_sharded(weight):
        raise ModelError(f"{path}: its weight is sharded over processes; shrink the model before sharding it (FSDP)")
    if not weight.is_floating_point() or weight.ndim != 2:
        raise ModelError(
            f"{path}: its weight is {weight.dtype} of shape {tuple(weight.shape)}, expected rows of a floating dtype; "
            "shrink before quantizing"
        )
    if weight.shape[0] != num_ids_of(module):
        size = "num_embeddings" if isinstance(module, LOOKUPS) else "out_features"
        raise ModelError(f"{path}: {size} is {num_ids_of(module):,}, its weight has {weight.shape[0]:,} rows")
    base = next(kind for kind in (*LOOKUPS, nn.Linear) if isinstance(module, kind))
    own = _own_forward(module, base)
    if own is not None:
        does = "multiplies by" if base is nn.Linear else "looks rows up in"
        raise BypassError(
            f"{path}: {own.__name__}.forward {does} the weight itself, not through torch.nn.{base.__name__}.forward, "
            "so that ids cannot be remapped there; this matrix cannot be shrunk"
        )
    _check_shadowing(path, module)


def _own_forward(module: Lookup | nn.Linear, base: type[nn.Module]) -> type | None:
    """The class of `module` below the torch class `base` whose forward is one of its own: it does not call super().

    A table's that only reads rows by their ids (Idefics) is none: the guard watches that forward, and answers them.
    """
    parents = type(module).__mro__
    for parent in parents[: parents.index(base)]:
        forward = parent.__dict__.get("forward")
        if forward is not None:
            names = set().union(*map(names_of, functions_in(forward)))
            if not {"super", "__class__", base.__name__} & names:
                reads = reads_of(module, [module]) if base is nn.Embedding else []
                return None if reads and all(read.is_of_rows for read in reads) else parent
            # F.embedding beside super(): which of the two sees an id is not ours to know.
            if _FUNCTIONS[base] in names:
                return parent
    return None


def _check_shadowing(path: str, module: nn.Module) -> None:
    hook = getattr(module, "_hf_hook", None)
    if any(getattr(part, "offload", False) for part in getattr(hook, "hooks", [hook])):
        raise ModelError(f"{path}: its weight is offloaded by accelerate; shrink the model before it is dispatched")
    # What was put on a table is watched, and its reads of rows are answered.
    if isinstance(module, nn.Linear) and has_forward_of_its_own(module):
        raise BypassError(
            f"{path}: its forward was replaced on the instance, which would shadow the one over the kept rows; undo that"
        )


def _check_size(table: FullTable) -> None:
    rows = table.weight.shape[0]
    if table.vocabulary.full_size != rows:
        hint = f"; {RESIZE_FIRST}" if table.vocabulary.full_size > rows else ""
        raise VocabularyError(
            f"{table.name}: the vocabulary's full size is {table.vocabulary.full_size:,}, the table has {rows:,} rows; build it "
            f"with PartialVocabulary.from_counts(…, model=model), or full_size={rows}{hint}"
        )
    if len(table.vocabulary) == 0:
        raise VocabularyError(f"{table.name}: the vocabulary is empty; a table of no rows cannot be trained")


def _check_padding(table: FullTable) -> None:
    """Raises `VocabularyError` where a bag skips an id that has no row: torch names what is skipped by its row."""
    for module in table.modules:
        padding = module.padding_idx if isinstance(module, nn.EmbeddingBag) else None
        if padding is not None and padding not in table.vocabulary:
            raise VocabularyError(
                f"{table.name}: the bags skip the id {padding} (padding_idx), which is not in the vocabulary; keep it with "
                f"PartialVocabulary.from_counts(…, always_keep=[{padding}])"
            )


def _check_ties(model: nn.Module, table: FullTable) -> None:
    weight, scorer = table.weight, ask(model, "get_output_embeddings")
    for path, owner in model.named_modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is None or not _overlap(tensor, weight) or owner in table.modules:
                continue
            where = f"{path}.{name}" if path else name
            if isinstance(owner, nn.Linear) or owner is scorer:
                raise TiedOutputError(
                    f"{type(model).__name__}: the input table {table.name}.weight is tied to the output layer {where}, which "
                    f"scores all {weight.shape[0]:,} tokens, so that no row can leave one without the other. "
                    'output="frozen" keeps unused rows in the softmax without training them, and is the default here; '
                    'output="full" needs an untied model (tie_word_embeddings=False)'
                )
            raise ModelError(
                f"{table.name}.weight shares its memory with {where} ({type(owner).__name__}), which has to stay whole"
            )


def _check_kept_elsewhere(model: nn.Module, table: FullTable) -> None:
    """References that modules keep beside their parameters would stay as they are, while the partial matrix trains."""
    for path, owner in model.named_modules():
        for name, value in vars(owner).items():
            kept = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            is_own = name in ("_parameters", "_buffers")
            if not is_own and any(isinstance(each, Tensor) and _overlap(each, table.weight) for each in kept):
                raise BypassError(
                    f"{f'{path}.' if path else ''}{name} of {type(owner).__name__} keeps {table.name}.weight beside its module: "
                    "it would stay as it is now while the partial matrix trains. Take that attribute away before shrinking, and "
                    "call the embedding module instead"
                )


def _overlap(first: Tensor, second: Tensor) -> bool:
    if first is second:
        return True
    if first.is_meta or second.is_meta or first.device != second.device or not first.numel():
        return False
    try:
        starts = first.data_ptr(), second.data_ptr()
    except RuntimeError:  # tensors without storage of their own
        return False
    return starts[0] < starts[1] + second.nbytes and starts[1] < starts[0] + first.nbytes


def _check_reads(model: nn.Module, table: FullTable) -> None:
    """Reads of the weight in each forward; those of rows, and those that only some forwards come to, are left to the guard."""
    for read in reads_of(model, table.modules):
        if read.is_certain and not read.is_of_rows:
            raise BypassError(
                f"{read} {table.name} itself (self.{'.'.join(read.attributes)}.weight), in every forward and around "
                f"{'the lookup that remaps ids' if table.output is None else 'the layer'}: a partial matrix would have wrong "
                "rows there. This matrix cannot be partial"
            )


def _check_wrappers(model: nn.Module, table: FullTable) -> None:
    for path, module in zip(table.paths, table.modules, strict=True):
        parts = path.split(".")
        for above in (".".join(parts[:depth]) for depth in range(1, len(parts))):
            wrapper = model.get_submodule(above)
            if type(wrapper).__name__ in (LAYER, WRAPPER):
                check_tokens(above, wrapper, module, table.output is not None)


def _check_not_cast(model: nn.Module, table: FullTable) -> None:
    """A quantized model whose matrices were cast to fp32 first has paid for all rows what shrinking was to save."""
    loaded = getattr(getattr(model, "config", None), "dtype", None)
    quantized = any(type(parameter).__name__ in _QUANTIZED for parameter in model.parameters())
    if quantized and table.weight.dtype == torch.float32 and loaded in (torch.bfloat16, torch.float16):
        raise ModelError(
            f"{table.name}: its {table.weight.nbytes:,} bytes are fp32 in a quantized model of {loaded}: "
            "prepare_model_for_kbit_training has cast all its rows. Swap the two: call shrink_ first and "
            "prepare_model_for_kbit_training after it, which then casts the kept rows alone"
        )


# --- options and gradients ----------------------------------------------------------------------------------------


def check_options(output: str | None, frozen_rows: str, ids: str, on_missing: str | None) -> None:
    """Raises `ModelError` for an option that is none, or that contradicts another."""
    for name, value, allowed in (
        ("output", output, (None, *OUTPUT_MODES)),
        ("frozen_rows", frozen_rows, FROZEN_ROWS_ON),
        ("ids", ids, ("full", "partial")),
        ("on_missing", on_missing, (None, "error", "base", "frozen", "extend")),
    ):
        if value not in allowed:
            *others, last = map(repr, allowed)
            raise ModelError(f"{name}={value!r}: expected {', '.join(others)} or {last}")
    if ids == "partial" and on_missing in ("base", "frozen"):
        raise ModelError(f"on_missing={on_missing!r} needs full ids: a partial id outside the vocabulary names no row")
    if on_missing == "extend" and ids == "partial":
        raise ModelError("on_missing='extend' needs full ids: with further rows each partial id would be another token")
    if on_missing == "frozen" and output == "restricted":
        raise ModelError(
            "on_missing='frozen' with output='restricted': every token may come as an input, and the softmax would be over the "
            "kept ones alone, so that most labels had no probability; leave output out"
        )
    if on_missing == "extend" and output == "restricted":
        raise ModelError(
            "on_missing='extend' with output='restricted': the softmax would be over more tokens after each batch, another "
            "objective each time; count the data first, or leave output out"
        )


def check_frozen(on_missing: str | None, frozen_rows: str, decay_unused_rows: bool) -> None:
    """Raises `ModelError` where rows that are to be frozen would move, or would not be on the device."""
    if on_missing == "frozen" and decay_unused_rows:
        raise ModelError(
            "on_missing='frozen' with decay_unused_rows=True: rows that do not train would be decayed; leave one of them out"
        )
    if on_missing == "frozen" and frozen_rows == "host":
        raise ModelError(
            "on_missing='frozen' with frozen_rows='host': a lookup of rows in host memory would wait for the device at each "
            "forward; leave frozen_rows out"
        )


def check_frozen_lookups(tables: list[FullTable]) -> None:
    """Raises `ModelError` for tables whose lookups change rows, or tell how often one came."""
    for table in tables:
        for path, module in zip(table.paths, table.modules, strict=True):
            options = {name: getattr(module, name, None) for name in ("max_norm", "scale_grad_by_freq", "sparse")}
            if given := [name for name, value in options.items() if value]:
                raise ModelError(
                    f"{path}: on_missing='frozen' with {given[0]}={options[given[0]]}, which depends on rows that do not train; "
                    "count the data first, and shrink without on_missing"
                )


def check_filter(filter_eps: object, frozen_rows: str) -> None:
    """Raises `ModelError` for a threshold that is none, or that rows on the host cannot be held against."""
    is_number = isinstance(filter_eps, int | float) and not isinstance(filter_eps, bool) and 0 < filter_eps < 1
    if not (filter_eps is None or filter_eps == "auto" or is_number):
        raise ModelError(f"filter_eps={filter_eps!r}: expected None, 'auto' or a number between 0 and 1")
    if filter_eps is not None and frozen_rows == "host":
        raise ModelError(
            f"filter_eps={filter_eps!r} with frozen_rows='host': rows that are streamed are multiplied before their share of the "
            "softmax is known; leave one of them out"
        )


def check_modes(model: nn.Module, tables: list[FullTable], ids: str, filter_eps: object) -> None:
    """Raises `ModelError` where partial ids would go to an output layer, or to a table for each layer that keeps others, and
    where no rows are frozen of which some were to be left out."""
    if filter_eps is not None and all(table.output != "frozen" for table in tables):
        raise ModelError(
            f"filter_eps={filter_eps!r} leaves frozen rows out of a gradient, and no output layer of this model would have "
            'frozen rows; leave it out, or shrink with output="frozen"'
        )
    per_layer = per_layer_modules(model)
    for table in tables if ids == "partial" else ():
        if table.output is not None:
            raise ModelError(
                f'{table.name}: output="{table.output}" takes labels and gives logits in full ids, and ids="partial" would '
                'have partial ones; leave ids="full", which needs no rewritten data'
            )
        is_other = not np.array_equal(table.vocabulary.token_ids, tables[0].vocabulary.token_ids)
        if is_other and any(module in per_layer for module in table.modules):
            raise ModelError(
                f"{table.name} is given the ids of {tables[0].name}, and keeps {len(table.vocabulary):,} rows where that keeps "
                f'{len(tables[0].vocabulary):,}, so that one partial id would be two tokens; leave ids="full"'
            )


def check_inserted_ids_stay(model: nn.Module, tables: list[FullTable]) -> None:
    """Raises `VocabularyError` where partial ids would move an id that the model compares with (padding, pooling at a token)."""
    for table in tables:
        size, partial_ids = table.vocabulary.full_size, {token_id: i for i, token_id in enumerate(table.vocabulary)}
        compared = PartialVocabulary.from_counts(np.zeros(size, np.int64), full_size=size, model=model)
        for token_id in compared:
            # An id that is not kept has no partial id: another's must not be equal to it.
            is_free = token_id not in partial_ids and token_id >= len(partial_ids)
            if not is_free and partial_ids.get(token_id) != token_id:
                raise VocabularyError(
                    f'{table.name}: with ids="partial" the id {token_id}, which the model compares with or inserts '
                    "(padding, end of sequence, …), must keep its place, and does not; build the vocabulary with "
                    f'always_keep=range({token_id + 1}), or leave ids="full", which needs no rewritten data'
                )


def check_gradient(table: FullTable) -> None:
    """Raises `OptimizerError` where a gradient that waits for its step would lose rows."""
    gradient = table.weight.grad
    if gradient is None:
        return
    touched = gradient.coalesce().indices()[0] if gradient.is_sparse else gradient.abs().sum(1).nonzero()[:, 0]
    outside = sorted(set(touched.tolist()) - set(table.vocabulary))
    if outside:
        raise OptimizerError(
            f"{table.name}.weight has gradients for {len(outside):,} rows outside the vocabulary, the first of them "
            f"{table.vocabulary.describe(outside[0])}, which would be lost; step or zero_grad() before shrinking"
        )


def check_can_grow(module: PartialModule, model: nn.Module) -> None:
    """Raises `ModelError` where a partial matrix cannot get further rows."""
    check_whole(module)
    module.check_length()
    name = module.table.name
    if module.table.ids == "partial":
        raise ModelError(
            f'{name}: the model was shrunk with ids="partial", and with further rows each partial id would be another token; '
            'merge_(model), and shrink it with ids="full" or with the wider vocabulary'
        )
    if isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(module.weight, "ds_id"):
        raise ModelError(
            f"{name}: {type(model).__name__} was made of the rows that there were (DistributedDataParallel, ZeRO-3); extend the "
            "model before it is wrapped"
        )
    refuse_where_rows_cannot_come(module.table, module.weight)


def check_whole(module: PartialModule) -> None:
    """Raises `ModelError` where other processes hold some of the rows."""
    if is_sharded(module.weight):
        raise ModelError(
            f"{module.table.name}: its rows are sharded over processes, and what shards them keeps the sizes that they had; save "
            "the full state dict, which needs no merging (get_model_state_dict with StateDictOptions(full_state_dict=True))"
        )
