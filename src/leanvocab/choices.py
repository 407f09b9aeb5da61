"""The words of options, and the label that does not count; loads nothing."""

from typing import Literal, TypeAlias, get_args

OutputMode: TypeAlias = Literal["full", "frozen", "restricted"]
FrozenRowsOn: TypeAlias = Literal["device", "host"]
FilterEps: TypeAlias = float | Literal["auto"]
OnMissing: TypeAlias = Literal["error", "base", "frozen", "extend"]
Ids: TypeAlias = Literal["full", "partial"]
OUTPUT_MODES: tuple[str, ...] = get_args(OutputMode)
FROZEN_ROWS_ON: tuple[str, ...] = get_args(FrozenRowsOn)
IGNORE_INDEX = -100  # labels that do not count, in torch's losses and everywhere else
