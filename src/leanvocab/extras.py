"""Optional dependencies: imported where they are needed, and their objects known without importing them."""

import sys
from importlib import import_module
from typing import Any

from leanvocab.errors import MissingExtraError


def require(module: str, extra: str) -> Any:
    """The module, imported.

    Raises:
        MissingExtraError: it is not installed; the message has the pip line.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != module.partition(".")[0]:
            raise  # the module is there, something that it needs is not
        raise MissingExtraError(
            f"this needs {module.partition('.')[0]}, which is not installed: pip install 'leanvocab[{extra}]'"
        ) from None


def is_instance(value: Any, module: str, *names: str) -> bool:
    """True where a value is of one of a module's classes; a module that nobody has imported has made no values."""
    loaded = sys.modules.get(module)
    return isinstance(value, tuple(getattr(loaded, name) for name in names if hasattr(loaded, name)))


def is_tensor(value: Any) -> bool:
    """True where a value is a torch tensor."""
    return is_instance(value, "torch", "Tensor")
