"""The tables that take a model's ids: what transformers' methods name, in the model and in every part of it."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from leanvocab.errors import ModelError
from leanvocab.model.full_table import LOOKUPS, Lookup, ask
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

# The id that Gemma 3n looks up in the tables of its layers for one that lies beyond them.
_ID_FOR_OTHERS = 0


def table_at(model: nn.Module, path: str) -> Lookup:
    """The embedding at a path. Raises `ModelError` where there is none."""
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        tables = [name for name, module in model.named_modules() if isinstance(module, LOOKUPS)]
        raise ModelError(
            f"{type(model).__name__} has no module {path!r}; its embeddings are {', '.join(tables) or 'none'}"
        ) from error
    if not isinstance(module, LOOKUPS):
        raise ModelError(f"{path} is a {type(module).__name__}, expected a torch.nn.Embedding or EmbeddingBag")
    return module


def input_tables(model: nn.Module, full_size: int, takes_tied: bool) -> list[Lookup]:
    """The tables that the model itself calls its input embeddings, those of its parts too; elsewhere the one of that size.

    Those of parts are of `full_size` rows, since other sizes are other vocabularies.
    """
    named = ask(model, "get_input_embeddings")
    tables = _tables_in(named, full_size)
    if not tables and isinstance(named, nn.Module):
        raise ModelError(
            f"{type(model).__name__}: its input embeddings are a {type(named).__name__}, expected a torch.nn.Embedding of "
            f"{full_size:,} rows, or a wrapper around one; name a table: embedding='path.to.module'"
        )
    if not tables:
        return [_table_of_size(model, full_size)]
    others = [module for module in model.modules() if not isinstance(module, LOOKUPS)]
    outside = {id(parameter) for module in others for parameter in module._parameters.values()}
    known = {id(table.weight) for table in tables}
    for table in _named_by_parts(model, "get_input_embeddings", full_size):
        is_new = id(table.weight) not in known and table.num_embeddings == full_size
        if is_new and (takes_tied or id(table.weight) not in outside):
            tables.append(table)
            known.add(id(table.weight))
    return tables


def per_layer_modules(model: nn.Module) -> list[Lookup]:
    """The tables in which the layers of a model look its ids up once more (Gemma 3n, Gemma 4)."""
    named = _named_by_parts(model, "get_per_layer_input_embeddings", 0)
    # Before transformers had that method, models held them under this name alone.
    held = (part._modules.get("embed_tokens_per_layer") for part in model.modules())
    return list(dict.fromkeys([*named, *(table for each in held for table in _tables_in(each, 0))]))


def vocabulary_over(vocabulary: PartialVocabulary, num_rows: int) -> PartialVocabulary:
    """What a table of another size keeps of a vocabulary: the ids that it has, and the one that stands for those beyond it."""
    kept = vocabulary.below(num_rows)
    if len(kept) == len(vocabulary) or _ID_FOR_OTHERS in kept:
        return kept
    return PartialVocabulary([_ID_FOR_OTHERS, *kept.token_ids], num_rows)


def _named_by_parts(model: nn.Module, method: str, full_size: int) -> Iterator[Lookup]:
    """The tables that a method of the model and of its parts gives, some of them several times."""
    for part in model.modules():
        if hasattr(type(part), method):
            yield from _tables_in(ask(part, method), full_size)


def _table_of_size(model: nn.Module, full_size: int) -> Lookup:
    by_size = _embeddings_of_size(model, full_size)
    if len({id(table.weight) for table in by_size}) != 1:
        raise ModelError(
            f"{type(model).__name__} does not say which table its ids go to, and {len(by_size)} of its embeddings have "
            f"{full_size:,} rows; name it: embedding='path.to.module'"
        )
    return by_size[0]


def _tables_in(module: Any, full_size: int) -> list[Lookup]:
    """The embedding itself, or those that a wrapper (of an adapter, say) holds."""
    if isinstance(module, LOOKUPS):
        return [module]
    return _embeddings_of_size(module, full_size) if isinstance(module, nn.Module) else []


def _embeddings_of_size(model: nn.Module, full_size: int) -> list[Lookup]:
    embeddings = (module for module in model.modules() if isinstance(module, LOOKUPS))
    return [table for table in embeddings if table.num_embeddings == full_size]
