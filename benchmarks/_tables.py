"""Results as rows of text, for the terminal and for docs/performance.md alike."""

from collections.abc import Iterable, Iterator

from benchmarks._results import OURS, Figure, Series

_SCALES = {"s": [(1, "s"), (1e-3, "ms"), (1e-6, "µs")], "bytes": [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")]}


def quantity(value: float, unit: str) -> str:
    """A value in a unit that suits its size: 0.0123 s → 12.3 ms."""
    if unit in _SCALES:
        factor, unit = next((scale for scale in _SCALES[unit] if abs(value) >= scale[0]), _SCALES[unit][-1])
        value /= factor
    return f"{_digits(value)} {unit}".strip()


def _digits(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cell(series: Series) -> str:
    """Median, with minimum and maximum where there were rounds, and how often leanvocab's value that is."""
    text = quantity(series.median, series.unit)
    if len(series.values) > 1:
        text += f" ({quantity(min(series.values), series.unit)} – {quantity(max(series.values), series.unit)})"
    return text if series.ratio is None else f"{text}, {_digits(series.ratio)} ×"


def compared(series: Iterable[Series]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(measure, header, rows): a row a program, a column a case, leanvocab first and limits last."""
    series = list(series)
    for measure in dict.fromkeys(each.measure for each in series):
        of_measure = [each for each in series if each.measure == measure]
        cases = list(dict.fromkeys(each.case for each in of_measure))
        names = sorted(dict.fromkeys(each.who for each in of_measure), key=_place)
        cells = {(each.who, each.case): cell(each) for each in of_measure}
        yield measure, ["", *cases], [[who, *(cells.get((who, case), "–") for case in cases)] for who in names]


def _place(who: str) -> int:
    return 2 if who.startswith("limit") else 0 if who.startswith(OURS) else 1


def figure_rows(figures: Iterable[Figure]) -> list[list[str]]:
    """Subject, figure, bar, verdict."""
    verdicts = {None: "", True: "holds", False: "falls short"}
    return [
        [
            each.what,
            quantity(each.value, each.unit),
            "" if each.bar is None else quantity(each.bar, each.unit),
            verdicts[each.holds],
        ]
        for each in figures
    ]


def where_a_peer_is_better(series: Iterable[Series], margin: float = 0.98) -> list[list[str]]:
    """(measure, program, cases with ratios) where a program's value is below leanvocab's by more than the margin."""
    found: dict[tuple[str, str], list[str]] = {}
    for each in series:
        if each.ratio is not None and each.ratio < margin and not each.is_limit and OURS not in each.who:
            found.setdefault((each.measure, each.who), []).append(f"{each.case}: {_digits(each.ratio)} ×")
    return [[measure, who, "; ".join(cases)] for (measure, who), cases in found.items()]
