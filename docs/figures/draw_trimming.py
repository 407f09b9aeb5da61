"""Trimming beside peers, and a trimmed model in use, from result files into docs/trimming.md; no figure is typed by hand."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks._report import read_all, table
from benchmarks._results import FOLDER, OURS, Result
from benchmarks.trimming_peers import PROGRAMS
from benchmarks.trimming_use import WHOLE
from docs.figures.written_between import write_between

PAGE = Path(__file__).parents[1] / "trimming.md"
BEGIN, END = "<!-- drawn by docs/figures/draw_trimming.py -->\n", "<!-- end of what was drawn -->\n"

_PEERS = """\
## Beside peers

Each program counts the same texts (XNLI), and trims the same folder to what occurs in them. Percentages are texts that give the
same tokens as before; *same bits* are the hidden states of 32 of them. In parentheses: seconds, and the peak of memory of the
process that did it, on {hardware}, one run each while the machine did other things too. vocabtrimmer 0.0.2 runs with
transformers 4 and keeps every id that occurs, as trimbed 0.0.4 does, on Python 3.13 and without its proof; prunetokens 0.1.4
takes no texts and drops what is not Latin.
`python -m benchmarks trimming_peers` makes the table, where `make peers` has been run.

"""
_USE = """\
## In use

`python -m benchmarks trimming_use` trains multilingual-e5-small for a few steps on pairs of XNLI (English, German), trims it to
the texts of these two languages, exports both to ONNX and measures each in a process of its own, on {hardware} while the machine
did other things too; all-MiniLM-L6-v2 is trimmed to English texts as it is. *Nearest is right* is the share of premises of the
test set whose hypothesis is the nearest.

"""


def drawn() -> str:
    """What stands between the marks in the page."""
    results = read_all(FOLDER)
    return "\n".join([*_beside_peers(results), *_in_use(results)])


def _beside_peers(results: Iterable[Result]) -> Iterator[str]:
    measured = [result for result in results if result.benchmark == "trimming_peers" and "outcomes" in result.details]
    if measured:
        rows = [[result.subject, *(_cell(result, name) for name in PROGRAMS)] for result in measured]
        yield _PEERS.format(hardware=measured[0].hardware) + table(["", *PROGRAMS], rows)


def _cell(result: Result, program: str) -> str:
    outcome = result.details["outcomes"].get(program, "not here").replace(" of the texts", "")
    taken = {series.measure: series for series in result.series if series.who == program}
    if not taken:
        return outcome.replace("|", "\\|")
    return f"{outcome} ({taken['time'].median:.1f} s, {taken['peak of memory'].median:,.0f} MB)"


def _in_use(results: Iterable[Result]) -> Iterator[str]:
    measured = [result for result in results if result.benchmark == "trimming_use"]
    for number, result in enumerate(measured):
        rows = []
        for series in result.series:
            if series.who != WHOLE or series.ratio is None:
                continue
            ours = next(
                its for its in result.series if (its.measure, its.case, its.who) == (series.measure, series.case, OURS)
            )
            cells = [f"{value:,.3g} {series.unit}" for value in (series.median, ours.median)]
            rows.append([f"{series.measure}, {series.case}", *cells, f"{1 / series.ratio:.2f}"])
        rows += [[figure.what, f"{figure.value:.3g} {figure.unit}", "", ""] for figure in result.figures]
        kept = f"{result.details['rows']:,} of {result.details['full_rows']:,} rows"
        head = _USE.format(hardware=result.hardware) if number == 0 else ""
        yield f"{head}### {result.subject}: {kept}\n\n" + table(["", "whole", "trimmed", "trimmed / whole"], rows)


if __name__ == "__main__":
    write_between(PAGE, BEGIN, drawn(), END)
