"""Finds a model's vocabulary matrices and everything that shares their memory. By storage, never by name: ties stay ties."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leanvocab.choices import OutputMode
from leanvocab.errors import AlreadyShrunkError, BypassError, ModelError, TiedOutputError, VocabularyError
from leanvocab.model.function_source import functions_in, names_of
from leanvocab.model.weight_reads import reads_of
from leanvocab.partial.module import PartialModule
from leanvocab.partial.sharded import is_sharded
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary
from leanvocab.vocabulary.special_ids import model_full_size

# Adapters that look rows up in the weight itself, with ids of the full vocabulary.
_WRAPPERS_AROUND_THE_LOOKUP = {"TrainableTokensLayer", "TrainableTokensWrapper"}
_QUANTIZED = {"Params4bit", "Int8Params"}  # bitsandbytes' parameters


@dataclass(frozen=True)
class FullTable:
    """One vocabulary matrix to shrink and every module that holds it: input tables, output layers, or both where tied."""

    paths: tuple[str, ...]
    modules: tuple[nn.Embedding | nn.Linear, ...]
    vocabulary: PartialVocabulary
    output: OutputMode | None = None  # what becomes of the scores, where an output layer holds it

    @property
    def name(self) -> str:
        return self.paths[0]

    @property
    def weight(self) -> nn.Parameter:
        return weight_of(self.modules[0])


def find_tables(
    model: nn.Module,
    vocabulary: PartialVocabulary | Mapping[str, PartialVocabulary],
    embedding: str | Iterable[str] | None,
    output: OutputMode | None = None,
) -> list[FullTable]:
    """The matrices to shrink and their vocabularies, checked; nothing is changed.

    Raises `ModelError` (or `TiedOutputError`, `AlreadyShrunkError`, `BypassError`) where the model cannot be shrunk in
    this way, and `VocabularyError` where a vocabulary is of another size than its matrix.
    """
    shrunk = [path for path, module in model.named_modules() if isinstance(module, PartialModule)]
    if shrunk:
        raise AlreadyShrunkError(
            f"{type(model).__name__} is shrunk already ({', '.join(shrunk)}); call merge_(model) first"
        )
    chosen = [(module, each.fitted_to(_rows(module))) for module, each in _chosen(model, vocabulary, embedding, output)]
    layers = output_layers(model, [module for module, _ in chosen])
    mode = output or ("frozen" if any(_is_held(layer, chosen) for layer in layers) else "full")
    if mode != "full":
        chosen = _with_outputs(model, layers, chosen, mode, vocabulary)
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[int, FullTable] = {}
    for module, its_vocabulary in chosen:
        _check_module(paths[id(module)], module)
        matrix = _matrix(model, weight_of(module), its_vocabulary, mode)
        known = found.setdefault(id(module.weight), matrix)
        if known.vocabulary != its_vocabulary:
            raise VocabularyError(
                f"{known.name} and {paths[id(module)]} are tied, and were given different vocabularies"
            )
    for matrix in found.values():
        _check_matrix(model, matrix)
    return list(found.values())


def _matrix(model: nn.Module, weight: nn.Parameter, vocabulary: PartialVocabulary, mode: OutputMode) -> FullTable:
    tables = {path: each for path, each in model.named_modules() if _holds(each, weight)}
    layers = {path: each for path, each in model.named_modules() if isinstance(each, nn.Linear) and _has(each, weight)}
    if mode == "full" or not layers:
        return FullTable(tuple(tables), tuple(tables.values()), vocabulary)
    both = tables | layers
    return FullTable(tuple(both), tuple(both.values()), vocabulary, mode)


def _check_matrix(model: nn.Module, matrix: FullTable) -> None:
    for path, each in zip(matrix.paths, matrix.modules, strict=True):
        _check_module(path, each)
    _check_size(matrix)
    _check_ties(model, matrix)
    _check_wrappers(model, matrix)
    _check_not_cast(model, matrix)
    _check_reads(model, matrix)


# --- the output layer -------------------------------------------------------------------------------------------------


def output_layers(model: nn.Module, tables: Iterable[nn.Module]) -> list[nn.Module]:
    """What scores the vocabulary: what the model names, or else linear layers that are tied to one of the tables.

    There are several in a model that scores several codebooks at once.
    """
    named = _ask(model, "get_output_embeddings")
    if isinstance(named, nn.Embedding):  # in FSMT, the table that its output layer is tied to
        rows = named.num_embeddings
        linear: list[nn.Module] = [each for each in model.modules() if isinstance(each, nn.Linear)]
        tied = [each for each in linear if each.weight is named.weight]
        return tied or [each for each in linear if each.out_features == rows]  # untied by hand
    if isinstance(named, nn.Module) and getattr(named, "weight", None) is not None:
        return [named] if isinstance(named, nn.Linear) else _wrapped(named) or [named]
    inside = [each for each in named.modules() if isinstance(each, nn.Linear)] if isinstance(named, nn.Module) else []
    if inside:
        return list(inside) if isinstance(named, nn.ModuleList) else list(inside[:1])
    weights = {id(each.weight) for each in tables}
    return [each for each in model.modules() if isinstance(each, nn.Linear) and id(each.weight) in weights]


def _wrapped(wrapper: nn.Module) -> list[nn.Module]:
    """The linear layers of the wrapper's shape that an adapter wraps: the layer itself, and copies of it that train."""
    shape = wrapper.weight.shape
    return [each for each in wrapper.modules() if isinstance(each, nn.Linear) and each.weight.shape == shape]


def _is_held(layer: nn.Module, chosen: list[tuple[Any, PartialVocabulary]]) -> bool:
    return any(layer.weight is module.weight for module, _ in chosen)


def _with_outputs(
    model: nn.Module,
    layers: list[nn.Module],
    chosen: list[tuple[nn.Embedding | nn.Linear, PartialVocabulary]],
    mode: OutputMode,
    vocabulary: PartialVocabulary | Mapping[str, PartialVocabulary],
) -> list[tuple[nn.Embedding | nn.Linear, PartialVocabulary]]:
    """The output layers beside the tables, those that have a matrix of their own."""
    if not layers:
        raise ModelError(
            f'{type(model).__name__} has no output layer over the vocabulary, so output="{mode}" means nothing; leave output out'
        )
    paths = {id(each): path for path, each in model.named_modules()}
    own: list[tuple[nn.Embedding | nn.Linear, PartialVocabulary]] = []
    for place, layer in enumerate(layers):
        path = paths[id(layer)]
        if not isinstance(layer, nn.Linear):
            raise ModelError(
                f'{path} is a {type(layer).__name__}, expected a torch.nn.Linear for output="{mode}"; this output layer can '
                'only stay whole: output="full"'
            )
        if not _is_held(layer, chosen):
            # As many layers as tables (codebooks, say): each has its table's vocabulary.
            tables = chosen[place : place + 1] if len(layers) == len(chosen) else chosen
            given = vocabulary.get(path) if isinstance(vocabulary, Mapping) else vocabulary
            own.append((layer, _vocabulary_of(path, _rows(layer), given, [each for _, each in tables])))
    return [*chosen, *own]


def _vocabulary_of(
    path: str, rows: int, given: PartialVocabulary | None, of_tables: list[PartialVocabulary]
) -> PartialVocabulary:
    """The one that was given for an output layer of so many rows, or else a table's."""
    if given is not None and given.fitted_to(rows).full_size == rows:
        return given.fitted_to(rows)
    fitting = [each for each in of_tables if each.full_size == rows] or [
        each for each in of_tables if each.full_size > rows
    ]
    if not fitting:
        raise VocabularyError(
            f"{path} scores {rows:,} tokens, and no vocabulary of that size was given; name one: "
            f"{{…, {path!r}: PartialVocabulary}}"
        )
    return _cut(fitting[-1], rows)


def _cut(vocabulary: PartialVocabulary, rows: int) -> PartialVocabulary:
    """The vocabulary's ids that an output layer of fewer rows than the input table scores."""
    if vocabulary.full_size == rows:
        return vocabulary
    ids = vocabulary.token_ids
    return PartialVocabulary(ids[ids < rows], rows)


# --- the input tables -------------------------------------------------------------------------------------------------


def _chosen(
    model: nn.Module,
    vocabulary: PartialVocabulary | Mapping[str, PartialVocabulary],
    embedding: str | Iterable[str] | None,
    output: OutputMode | None,
) -> list[tuple[nn.Embedding | nn.Linear, PartialVocabulary]]:
    if isinstance(vocabulary, Mapping):
        if embedding is not None:
            raise ModelError("embedding= was given beside a mapping {table: vocabulary}, which names the tables itself")
        layers = {id(layer) for layer in output_layers(model, ())}
        tables = {path: each for path, each in vocabulary.items() if id(_find(model, path)) not in layers}
        return [(_at(model, path), its_vocabulary) for path, its_vocabulary in tables.items()]
    if not isinstance(vocabulary, PartialVocabulary):
        raise VocabularyError(
            f"expected a PartialVocabulary or a mapping {{table: PartialVocabulary}}, found {type(vocabulary).__name__}; "
            "make one with PartialVocabulary.from_counts(count_tokens(dataset), tokenizer=tokenizer, model=model)"
        )
    if embedding is not None:
        names = [embedding] if isinstance(embedding, str) else list(embedding)
        return [(_at(model, path), vocabulary) for path in names]
    full_size = vocabulary.fitted_to(model_full_size(model) or 0).full_size
    return [(module, vocabulary) for module in _input_embeddings(model, full_size, takes_tied=output != "full")]


def _at(model: nn.Module, path: str) -> nn.Embedding:
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        tables = [name for name, each in model.named_modules() if isinstance(each, nn.Embedding)]
        raise ModelError(
            f"{type(model).__name__} has no module {path!r}; its embeddings are {', '.join(tables) or 'none'}"
        ) from error
    return _as_embedding(path, module)


def _as_embedding(path: str, module: nn.Module) -> nn.Embedding:
    if not isinstance(module, nn.Embedding):
        raise ModelError(f"{path} is a {type(module).__name__}, expected a torch.nn.Embedding")
    return module


def _input_embeddings(model: nn.Module, full_size: int, takes_tied: bool) -> list[nn.Embedding]:
    """What the model itself calls its input embeddings, the decoder's own table too; elsewhere the one table of that size."""
    named = _ask(model, "get_input_embeddings")
    found = _tables_in(named, full_size)
    if isinstance(named, nn.Module) and not found:
        raise ModelError(
            f"{type(model).__name__}: its input embeddings are a {type(named).__name__}, expected a torch.nn.Embedding of "
            f"{full_size:,} rows, or a wrapper around one; name a table: embedding='path.to.module'"
        )
    if not found:
        by_size = [
            each for each in model.modules() if isinstance(each, nn.Embedding) and each.num_embeddings == full_size
        ]
        if len({id(each.weight) for each in by_size}) != 1:
            raise ModelError(
                f"{type(model).__name__} does not say which table its ids go to, and {len(by_size)} of its embeddings have "
                f"{full_size:,} rows; name it: embedding='path.to.module'"
            )
        return by_size[:1]
    main = {id(each.weight) for each in found}
    for side in ("get_encoder", "get_decoder"):
        for each in _tables_in(_ask(_ask(model, side), "get_input_embeddings"), full_size):
            tied_to_output = any(id(p) == id(each.weight) for p in _parameters_outside_embeddings(model))
            if id(each.weight) not in main and each.num_embeddings == full_size and (takes_tied or not tied_to_output):
                found.append(each)
                main.add(id(each.weight))
    return found


def _tables_in(module: Any, full_size: int) -> list[nn.Embedding]:
    """The embedding itself, or those that a wrapper (of an adapter, say) holds."""
    if isinstance(module, nn.Embedding):
        return [module]
    if not isinstance(module, nn.Module):
        return []
    return [each for each in module.modules() if isinstance(each, nn.Embedding) and each.num_embeddings == full_size]


def _ask(owner: Any, method: str) -> Any:
    try:
        return getattr(owner, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _parameters_outside_embeddings(model: nn.Module) -> list[nn.Parameter]:
    return [
        p
        for each in model.modules()
        if not isinstance(each, nn.Embedding)
        for p in each._parameters.values()
        if p is not None
    ]


def _find(model: nn.Module, path: str) -> nn.Module | None:
    return dict(model.named_modules()).get(path)


def _rows(module: nn.Module) -> int:
    """As many ids as the module takes or scores."""
    return int(module.num_embeddings if isinstance(module, nn.Embedding) else module.out_features)  # type: ignore[arg-type]


def weight_of(module: nn.Module) -> nn.Parameter:
    """The weight as the parameter that it is; torch annotates it as a tensor."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _holds(module: nn.Module, weight: nn.Parameter) -> bool:
    return isinstance(module, nn.Embedding) and _has(module, weight)


def _has(module: nn.Module, weight: nn.Parameter) -> bool:
    return module._parameters.get("weight") is weight


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_module(path: str, module: nn.Embedding | nn.Linear) -> None:
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
    if weight.shape[0] != _rows(module):
        size = "num_embeddings" if isinstance(module, nn.Embedding) else "out_features"
        raise ModelError(f"{path}: {size} is {_rows(module):,}, its weight has {weight.shape[0]:,} rows")
    base = nn.Embedding if isinstance(module, nn.Embedding) else nn.Linear
    own = _own_forward(type(module), base)
    if own is not None:
        does = "looks rows up in" if base is nn.Embedding else "multiplies by"
        raise BypassError(
            f"{path}: {own.__name__}.forward {does} the weight itself, not through torch.nn.{base.__name__}.forward, "
            "so that ids cannot be remapped there; this matrix cannot be shrunk"
        )
    _check_shadowing(path, module)


def _own_forward(cls: type, base: type[nn.Module]) -> type | None:
    """The class between `cls` and the torch class `base` whose forward does not call super(): one of its own."""
    for each in cls.__mro__[: cls.__mro__.index(base)]:
        forward = each.__dict__.get("forward")
        if forward is not None:
            names = set().union(*map(names_of, functions_in(forward)))
            if "super" not in names and "__class__" not in names and base.__name__ not in names:
                return each
            if (
                base.__name__.lower() in names
            ):  # F.embedding beside super(): which of the two sees an id is not ours to know
                return each
    return None


def _check_shadowing(path: str, module: nn.Module) -> None:
    hook = getattr(module, "_hf_hook", None)
    if any(getattr(each, "offload", False) for each in getattr(hook, "hooks", [hook])):
        raise ModelError(f"{path}: its weight is offloaded by accelerate; shrink the model before it is dispatched")
    forward = module.__dict__.get("forward")
    if forward is not None and hook is None and getattr(forward, "__func__", None) is not type(module).forward:
        raise BypassError(
            f"{path}: its forward was replaced on the instance, which would shadow the remapped lookup; undo that"
        )


def _check_size(table: FullTable) -> None:
    rows = table.weight.shape[0]
    if table.vocabulary.full_size != rows:
        raise VocabularyError(
            f"{table.name}: the vocabulary's full size is {table.vocabulary.full_size:,}, the table has {rows:,} rows; build it "
            f"with PartialVocabulary.from_counts(…, model=model), or full_size={rows}"
        )
    if len(table.vocabulary) == 0:
        raise VocabularyError(f"{table.name}: the vocabulary is empty; a table of no rows cannot be trained")


def _check_ties(model: nn.Module, table: FullTable) -> None:
    for path, owner in model.named_modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is None or not _overlap(tensor, table.weight) or owner in table.modules:
                continue
            where = f"{path}.{name}" if path else name
            if isinstance(owner, nn.Linear) or owner is _ask(model, "get_output_embeddings"):
                raise TiedOutputError(
                    f"{type(model).__name__}: the input table {table.name}.weight is tied to the output layer {where}, which "
                    f"scores all {table.weight.shape[0]:,} tokens, so that no row can leave one without the other. "
                    'output="frozen" keeps unused rows in the softmax without training them, and is the default here; '
                    'output="full" needs an untied model (tie_word_embeddings=False)'
                )
            raise ModelError(
                f"{table.name}.weight shares its memory with {where} ({type(owner).__name__}), which has to stay whole"
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


def _check_reads(model: nn.Module, matrix: FullTable) -> None:
    """What only some forwards would come to is left to the guard."""
    for read in reads_of(model, matrix.modules):
        if read.is_certain:
            raise BypassError(
                f"{read} {matrix.name} itself (self.{'.'.join(read.attributes)}.weight), in every forward and around "
                f"{'the lookup that remaps ids' if matrix.output is None else 'the layer'}: a partial matrix would have wrong "
                "rows there. This matrix cannot be partial"
            )


def _check_wrappers(model: nn.Module, table: FullTable) -> None:
    for path in table.paths:
        parts = path.split(".")
        for depth in range(1, len(parts)):
            above = model.get_submodule(".".join(parts[:depth]))
            if type(above).__name__ in _WRAPPERS_AROUND_THE_LOOKUP:
                raise BypassError(
                    f"{'.'.join(parts[:depth])}: {type(above).__name__} (PEFT's trainable tokens) looks ids up in the weight "
                    "itself, and would read wrong rows of a partial one; leanvocab trains chosen rows without it"
                )


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
