"""What may become of an output layer, and where frozen rows may be; loads nothing."""

from typing import Literal, TypeAlias, get_args

OutputMode: TypeAlias = Literal["full", "frozen", "restricted"]
FrozenPlace: TypeAlias = Literal["device", "host"]
OUTPUT_MODES: tuple[str, ...] = get_args(OutputMode)
FROZEN_PLACES: tuple[str, ...] = get_args(FrozenPlace)
