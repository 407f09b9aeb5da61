"""Finds a model's input tables and everything that shares their memory. By storage, never by name: ties stay ties."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from leanvocab.embedding import RemapEmbedding
from leanvocab.errors import AlreadyShrunkError, BypassError, ModelError, TiedOutputError, VocabularyError
from leanvocab.inserted import model_full_size
from leanvocab.vocabulary import PartialVocabulary

# Adapters that look rows up in the weight itself, with ids of the full vocabulary.
_WRAPPERS_AROUND_THE_LOOKUP = {"TrainableTokensLayer", "TrainableTokensWrapper"}


@dataclass(frozen=True)
class InputTable:
    """One vocabulary matrix and every embedding module that holds it."""

    paths: tuple[str, ...]
    modules: tuple[nn.Embedding, ...]
    vocabulary: PartialVocabulary

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
) -> list[InputTable]:
    """The tables to shrink and their vocabularies, checked; nothing is changed.

    Raises `ModelError` (or `TiedOutputError`, `AlreadyShrunkError`, `BypassError`) where the model cannot be shrunk in
    this way, and `VocabularyError` where a vocabulary is of another size than its table.
    """
    shrunk = [path for path, module in model.named_modules() if isinstance(module, RemapEmbedding)]
    if shrunk:
        raise AlreadyShrunkError(
            f"{type(model).__name__} is shrunk already ({', '.join(shrunk)}); call merge_(model) first"
        )
    chosen = [(module, each.fitted_to(module.num_embeddings)) for module, each in _chosen(model, vocabulary, embedding)]
    paths = {id(module): path for path, module in model.named_modules()}
    tables: dict[int, InputTable] = {}
    for module, its_vocabulary in chosen:
        _check_module(paths[id(module)], module)
        holders = {path: each for path, each in model.named_modules() if _holds(each, weight_of(module))}
        table = InputTable(tuple(holders), tuple(holders.values()), its_vocabulary)
        known = tables.setdefault(id(module.weight), table)
        if known.vocabulary != its_vocabulary:
            raise VocabularyError(
                f"{known.name} and {paths[id(module)]} are tied, and were given different vocabularies"
            )
    for table in tables.values():
        for path, each in zip(table.paths, table.modules, strict=True):
            _check_module(path, each)
        _check_size(table)
        _check_ties(model, table)
        _check_wrappers(model, table)
    return list(tables.values())


def _chosen(
    model: nn.Module,
    vocabulary: PartialVocabulary | Mapping[str, PartialVocabulary],
    embedding: str | Iterable[str] | None,
) -> list[tuple[nn.Embedding, PartialVocabulary]]:
    if isinstance(vocabulary, Mapping):
        if embedding is not None:
            raise ModelError("embedding= was given beside a mapping {table: vocabulary}, which names the tables itself")
        return [(_at(model, path), its_vocabulary) for path, its_vocabulary in vocabulary.items()]
    if not isinstance(vocabulary, PartialVocabulary):
        raise VocabularyError(
            f"expected a PartialVocabulary or a mapping {{table: PartialVocabulary}}, found {type(vocabulary).__name__}; "
            "make one with PartialVocabulary.from_counts(count_tokens(dataset), tokenizer=tokenizer, model=model)"
        )
    if embedding is not None:
        names = [embedding] if isinstance(embedding, str) else list(embedding)
        return [(_at(model, path), vocabulary) for path in names]
    full_size = vocabulary.fitted_to(model_full_size(model) or 0).full_size
    return [(module, vocabulary) for module in _input_embeddings(model, full_size)]


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


def _input_embeddings(model: nn.Module, full_size: int) -> list[nn.Embedding]:
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
            if id(each.weight) not in main and each.num_embeddings == full_size and not tied_to_output:
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


def weight_of(module: nn.Embedding) -> nn.Parameter:
    """The weight as the parameter that it is; torch annotates it as a tensor."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _holds(module: nn.Module, weight: nn.Parameter) -> bool:
    return isinstance(module, nn.Embedding) and module._parameters.get("weight") is weight


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_module(path: str, module: nn.Embedding) -> None:
    weight = module._parameters.get("weight")
    if weight is None:
        raise ModelError(f"{path}: its weight is computed (parametrized), and has no rows to take; remove that first")
    if not weight.is_floating_point() or weight.ndim != 2:
        raise ModelError(
            f"{path}: its weight is {weight.dtype} of shape {tuple(weight.shape)}, expected rows of a floating dtype; "
            "shrink before quantizing"
        )
    if weight.shape[0] != module.num_embeddings:
        raise ModelError(
            f"{path}: num_embeddings is {module.num_embeddings:,}, its weight has {weight.shape[0]:,} rows"
        )
    looked_up = _own_lookup(type(module))
    if looked_up is not None:
        raise BypassError(
            f"{path}: {looked_up.__name__}.forward looks rows up in the weight itself, not through torch.nn.Embedding.forward, "
            "so that ids cannot be remapped there; this table cannot be shrunk"
        )
    _check_shadowing(path, module)


def _own_lookup(cls: type) -> type | None:
    """The class between `cls` and nn.Embedding whose forward does not call super(): a lookup of its own."""
    for each in cls.__mro__[: cls.__mro__.index(nn.Embedding)]:
        forward = each.__dict__.get("forward")
        if forward is not None:
            code = getattr(_unwrapped(forward), "__code__", None)
            names = () if code is None else code.co_names + code.co_freevars
            if "super" not in names and "__class__" not in names and "Embedding" not in names:
                return each
            if "embedding" in names:  # F.embedding beside super(): which of the two sees an id is not ours to know
                return each
    return None


def _unwrapped(function: Any) -> Any:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _check_shadowing(path: str, module: nn.Embedding) -> None:
    hook = getattr(module, "_hf_hook", None)
    if any(getattr(each, "offload", False) for each in getattr(hook, "hooks", [hook])):
        raise ModelError(f"{path}: its weight is offloaded by accelerate; shrink the model before it is dispatched")
    forward = module.__dict__.get("forward")
    if forward is not None and hook is None and getattr(forward, "__func__", None) is not type(module).forward:
        raise BypassError(
            f"{path}: its forward was replaced on the instance, which would shadow the remapped lookup; undo that"
        )


def _check_size(table: InputTable) -> None:
    rows = table.weight.shape[0]
    if table.vocabulary.full_size != rows:
        raise VocabularyError(
            f"{table.name}: the vocabulary's full size is {table.vocabulary.full_size:,}, the table has {rows:,} rows; build it "
            f"with PartialVocabulary.from_counts(…, model=model), or full_size={rows}"
        )
    if len(table.vocabulary) == 0:
        raise VocabularyError(f"{table.name}: the vocabulary is empty; a table of no rows cannot be trained")


def _check_ties(model: nn.Module, table: InputTable) -> None:
    for path, owner in model.named_modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is None or not _overlap(tensor, table.weight) or _holds(owner, table.weight):
                continue
            where = f"{path}.{name}" if path else name
            if isinstance(owner, nn.Linear) or owner is _ask(model, "get_output_embeddings"):
                raise TiedOutputError(
                    f"{type(model).__name__}: the input table {table.name}.weight is tied to the output layer {where}, which "
                    f"scores all {table.weight.shape[0]:,} tokens, so that no row can leave one without the other. The mode for "
                    'tied models is output="frozen" (unused rows stay in the softmax); this version does not offer it yet. '
                    "Load a model class without this head, or untie the two (tie_word_embeddings=False)"
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


def _check_wrappers(model: nn.Module, table: InputTable) -> None:
    for path in table.paths:
        parts = path.split(".")
        for depth in range(1, len(parts)):
            above = model.get_submodule(".".join(parts[:depth]))
            if type(above).__name__ in _WRAPPERS_AROUND_THE_LOOKUP:
                raise BypassError(
                    f"{'.'.join(parts[:depth])}: {type(above).__name__} (PEFT's trainable tokens) looks ids up in the weight "
                    "itself, and would read wrong rows of a partial one; leanvocab trains chosen rows without it"
                )
