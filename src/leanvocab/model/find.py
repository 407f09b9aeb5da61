"""Finds a model's vocabulary matrices and everything that shares their memory. By storage, never by name: ties stay ties."""

from collections.abc import Iterable, Mapping

from torch import nn

from leanvocab.choices import OutputMode
from leanvocab.errors import AlreadyShrunkError, ModelError, VocabularyError
from leanvocab.model.checks import check_module, check_table
from leanvocab.model.full_table import LOOKUPS, FullTable, Lookup, ask, num_ids_of, weight_of
from leanvocab.model.input_tables import input_tables, per_layer_modules, table_at, vocabulary_over
from leanvocab.partial.module import partial_modules
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary
from leanvocab.vocabulary.special_ids import model_full_size

Chosen = list[tuple[Lookup | nn.Linear, PartialVocabulary]]  # modules, each with the vocabulary that fits it


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
    shrunk = partial_modules(model)
    if shrunk:
        raise AlreadyShrunkError(
            f"{type(model).__name__} is shrunk already ({', '.join(shrunk)}); call merge_(model) first"
        )
    chosen = _choose(model, vocabulary, embedding, output)
    layers = output_layers(model, [module for module, _ in chosen])
    mode = output or ("frozen" if any(_is_held(layer, chosen) for layer in layers) else "full")
    if mode != "full":
        chosen = _with_outputs(model, layers, chosen, mode, vocabulary)
    if isinstance(vocabulary, PartialVocabulary) and embedding is None:
        its = chosen[0][1]
        chosen += [(table, vocabulary_over(its, table.num_embeddings)) for table in per_layer_modules(model)]
    paths = {id(module): path for path, module in model.named_modules()}
    tables: dict[int, FullTable] = {}
    for module, its_vocabulary in chosen:
        check_module(paths[id(module)], module)
        table = _make_table(model, weight_of(module), its_vocabulary, mode)
        known = tables.setdefault(id(module.weight), table)
        if known.vocabulary is not its_vocabulary and known.vocabulary != its_vocabulary:
            raise VocabularyError(
                f"{known.name} and {paths[id(module)]} are tied, and were given different vocabularies"
            )
    for table in tables.values():
        check_table(model, table)
    return list(tables.values())


def _choose(
    model: nn.Module,
    vocabulary: PartialVocabulary | Mapping[str, PartialVocabulary],
    embedding: str | Iterable[str] | None,
    output: OutputMode | None,
) -> Chosen:
    """The input tables that are to be shrunk, each with its vocabulary, fitted to it; those for each layer aside."""
    if isinstance(vocabulary, Mapping):
        if embedding is not None:
            raise ModelError("embedding= was given beside a mapping {table: vocabulary}, which names the tables itself")
        modules, layers = dict(model.named_modules()), output_layers(model, ())
        named = {path: its for path, its in vocabulary.items() if modules.get(path) not in layers}
    elif not isinstance(vocabulary, PartialVocabulary):
        raise VocabularyError(
            f"expected a PartialVocabulary or a mapping {{table: PartialVocabulary}}, found {type(vocabulary).__name__}; "
            "make one with PartialVocabulary.from_counts(count_tokens(dataset), tokenizer=tokenizer, model=model)"
        )
    elif embedding is not None:
        named = dict.fromkeys([embedding] if isinstance(embedding, str) else embedding, vocabulary)
    else:
        fitted = vocabulary.fitted_to(model_full_size(model) or 0)
        return [(table, fitted) for table in input_tables(model, fitted.full_size, takes_tied=output != "full")]
    tables = [(table_at(model, path), its) for path, its in named.items()]
    return [(table, its.fitted_to(table.num_embeddings)) for table, its in tables]


def _make_table(model: nn.Module, weight: nn.Parameter, vocabulary: PartialVocabulary, mode: OutputMode) -> FullTable:
    holders = {path: module for path, module in model.named_modules() if module._parameters.get("weight") is weight}
    held = {path: module for path, module in holders.items() if isinstance(module, LOOKUPS)}
    layers = {path: module for path, module in holders.items() if isinstance(module, nn.Linear) and mode != "full"}
    return FullTable((*held, *layers), (*held.values(), *layers.values()), vocabulary, mode if layers else None)


# --- the output layer -------------------------------------------------------------------------------------------------


def output_layers(model: nn.Module, tables: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules that score the vocabulary: what the model names, or else linear layers that are tied to one of the tables.

    There are several in a model that scores several codebooks at once.
    """
    named = ask(model, "get_output_embeddings")
    if isinstance(named, nn.Embedding):  # in FSMT, the table that its output layer is tied to
        tied = [layer for layer in _linear_layers(model) if layer.weight is named.weight]
        return tied or [layer for layer in _linear_layers(model) if layer.out_features == named.num_embeddings]
    if isinstance(named, nn.Module) and getattr(named, "weight", None) is not None:
        return [named] if isinstance(named, nn.Linear) else _wrapped(named) or [named]
    inside = _linear_layers(named) if isinstance(named, nn.Module) else []
    if inside:
        return inside if isinstance(named, nn.ModuleList) else inside[:1]
    weights = {id(table.weight) for table in tables}
    return [layer for layer in _linear_layers(model) if id(layer.weight) in weights]


def _linear_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def _wrapped(wrapper: nn.Module) -> list[nn.Module]:
    """The linear layers of the wrapper's shape that an adapter wraps: the layer itself, and copies of it that train."""
    return [layer for layer in _linear_layers(wrapper) if layer.weight.shape == wrapper.weight.shape]


def _is_held(layer: nn.Module, chosen: Chosen) -> bool:
    return any(layer.weight is module.weight for module, _ in chosen)


def _with_outputs(
    model: nn.Module,
    layers: list[nn.Module],
    chosen: Chosen,
    mode: OutputMode,
    vocabulary: PartialVocabulary | Mapping[str, PartialVocabulary],
) -> Chosen:
    """The output layers beside the tables, those that have a matrix of their own."""
    if not layers:
        raise ModelError(
            f'{type(model).__name__} has no output layer over the vocabulary, so output="{mode}" means nothing; leave output out'
        )
    paths = {id(module): path for path, module in model.named_modules()}
    own: Chosen = []
    for number, layer in enumerate(layers):
        path = paths[id(layer)]
        if not isinstance(layer, nn.Linear):
            raise ModelError(
                f'{path} is a {type(layer).__name__}, expected a torch.nn.Linear for output="{mode}"; this output layer can '
                'only stay whole: output="full"'
            )
        if not _is_held(layer, chosen):
            # As many layers as tables (codebooks, say): each has its table's vocabulary.
            tables = chosen[number : number + 1] if len(layers) == len(chosen) else chosen
            given = vocabulary.get(path) if isinstance(vocabulary, Mapping) else vocabulary
            own.append((layer, _vocabulary_of(path, num_ids_of(layer), given, [its for _, its in tables])))
    return [*chosen, *own]


def _vocabulary_of(
    path: str, num_ids: int, given: PartialVocabulary | None, of_tables: list[PartialVocabulary]
) -> PartialVocabulary:
    """The one that was given for an output layer over so many ids, or else the ids of a table's that the layer scores."""
    fitted = None if given is None else given.fitted_to(num_ids)
    if fitted is not None and fitted.full_size == num_ids:
        return fitted
    for its in reversed(of_tables):
        if its.full_size == num_ids:
            return its
    for its in reversed(of_tables):
        if its.full_size > num_ids:
            return its.below(num_ids)
    raise VocabularyError(
        f"{path} scores {num_ids:,} tokens, and no vocabulary of that size was given; name one: "
        f"{{…, {path!r}: PartialVocabulary}}"
    )
