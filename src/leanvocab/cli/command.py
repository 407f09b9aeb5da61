"""Commands made of functions: options from dataclasses, errors in one message, results as JSON or for a person."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, NamedTuple, cast, get_type_hints

import typer

from leanvocab.cli.options import in_options
from leanvocab.cli.printing import AsJson, Note, clean_errors, print_json, print_rich
from leanvocab.errors import SettingsError
from leanvocab.finetune.settings import GROUPS

# tuple[str, ...] is an option that may be given several times; its name is then better said in the singular.
_SINGULAR = {"text_columns": "--text-column", "token_columns": "--token-column", "keep_scripts": "--keep-script"}
_HEADINGS = {field.name: heading for heading, group in GROUPS.items() for field in fields(group)}


class Answer(NamedTuple):
    """The result of a command: plain values for `--json`, and what is printed for a person, made only if it is asked for."""

    plain: Any
    printed: Callable[[], Sequence[Any]]


def as_command(function: Callable[..., Answer]) -> Callable[..., None]:
    """A command that says the errors and prints the answer of a function, and has its parameters for options.

    A parameter whose type is a dataclass stands for an option of each of its fields. `--json` is added.
    """
    parameters = inspect.signature(function).parameters.values()
    groups: dict[str, Any] = {p.name: p.annotation for p in parameters if is_dataclass(p.annotation)}

    options = list(_options(parameters))
    flags = {option.name: flag_of(option.name) for option in options}

    def run(*, as_json: bool, **values: Any) -> None:
        with clean_errors(
            as_json, lambda error: in_options(str(error), flags, is_setting=isinstance(error, SettingsError))
        ):
            for name, group in groups.items():
                values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
            answer = function(**values)
        if as_json:
            print_json(answer.plain)
        else:
            print_rich(*(in_options(part, flags) if isinstance(part, Note) else part for part in answer.printed()))

    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options}
    run.__doc__ = function.__doc__
    return run


def _options(parameters: Iterable[inspect.Parameter]) -> Iterator[inspect.Parameter]:
    for parameter in parameters:
        if is_dataclass(parameter.annotation):
            yield from _options_of(parameter.annotation)
        else:
            yield parameter
    yield _keyword("as_json", False, AsJson)


def _options_of(group: Any) -> Iterator[inspect.Parameter]:
    """An option for each field, which is annotated with it, or a knob of the settings that says what it does."""
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        hint, default = hints[field.name], cast(Any, field.default)
        if about := field.metadata.get("about"):
            if hint == tuple[str, ...]:
                hint, default = list[str], list(default)
            flag = flag_of(field.name)
            show, heading = default not in (None, []), _HEADINGS[field.name]
            hint = Annotated[hint, typer.Option(flag, help=about.help, rich_help_panel=heading, show_default=show)]
        yield _keyword(field.name, default, hint)


def flag_of(name: str) -> str:
    """The option of a field of the settings, or of a function's parameter."""
    return _SINGULAR.get(name, "--" + name.replace("_", "-"))


def _keyword(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
