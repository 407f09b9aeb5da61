"""Caches that are emptied when the last shrunk model goes (docs/decisions/nothing-outlives-a-model.md). No torch."""

from collections.abc import MutableMapping
from typing import Any, TypeVar

Cache = TypeVar("Cache", bound=MutableMapping[Any, Any])
_caches: list[MutableMapping[Any, Any]] = []


def emptied_with_models(cache: Cache) -> Cache:
    """The cache itself, from now on emptied when the last shrunk model goes."""
    _caches.append(cache)
    return cache


def empty_caches() -> None:
    """Forgets everything that a later model can find out again."""
    for cache in _caches:
        cache.clear()
