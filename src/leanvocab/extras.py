"""Optional dependencies: checked at the door of the room that needs them."""

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
