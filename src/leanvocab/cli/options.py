"""Command line options made from `FineTuneSettings`, so that each knob is written down once."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Annotated, Any, get_args, get_type_hints

import typer

from leanvocab.finetune.settings import About, FineTuneSettings

# tuple[str, ...] is an option that may be given several times; its name is then better said in the singular.
_SINGULAR = {"text_columns": "--text-column"}


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Adds an option for each knob to a command that takes them as `**knobs`; `settings_from` puts them together."""

    def run(**values: Any) -> None:
        command(**values)

    own = [
        parameter
        for parameter in inspect.signature(command).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    run.__signature__ = inspect.Signature([*own, *_options()])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (*own, *_options())}
    run.__doc__ = command.__doc__
    return run


def settings_from(knobs: dict[str, Any]) -> FineTuneSettings:
    """The settings that the options say.

    Raises:
        SettingsError: a value is out of its range.
    """
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in knobs.items()}
    return FineTuneSettings(**values)


def _options() -> list[inspect.Parameter]:
    hints = get_type_hints(FineTuneSettings, include_extras=True)
    return [_option(field.name, hints[field.name], field.default) for field in fields(FineTuneSettings)]


def _option(name: str, hint: Any, default: Any) -> inspect.Parameter:
    assert default is not MISSING, f"{name} has no default"
    kind, about = get_args(hint)
    assert isinstance(about, About)
    if kind == tuple[str, ...]:
        kind, default = list[str], list(default)
    flag = _SINGULAR.get(name, "--" + name.replace("_", "-"))
    option = typer.Option(flag, help=about.help, rich_help_panel=about.heading, show_default=default not in (None, []))
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
