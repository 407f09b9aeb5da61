"""docs/performance.md and its plots, from result files: `python -m benchmarks report`. Nothing on the page is typed by hand."""

import argparse
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks._command import About
from benchmarks._results import FOLDER, OURS, Result, Series
from benchmarks._summary import render_summary
from benchmarks._tables import compared, figure_rows, where_a_peer_is_better

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
SUMMARY = "results.md"  # beside it
_HEAD = """\
# Performance

leanvocab beside what people use today, on the same work, in the same run. This page is written from result files by
`python -m benchmarks report`; every figure on it was measured on the machine that stands above its table, or is called counted
there, and what was not measured is listed as open, with the reason.

```bash
python -m benchmarks            # what there is: what each measures, beside whom, and the limit
python -m benchmarks counting   # one of them; --size small to see it work, --json for machines, --help for its options
make peers                      # fetches the peers: the authors' code, transformer-smaller-training-vocab, torchao
make benchmarks                 # all of them, within the budgets below, and this page
make gpu                        # all that needs a GPU, within 25 minutes
python -m benchmarks fits --device paper    # bytes on a GPU, counted without one
```

## How to read it

- Programs take turns (A B C, C B A, …) in one run. A cell has the median, in parentheses the minimum and the maximum, and how
  many times leanvocab's value that is: the median of the ratios pair by pair. Above 1 × the program takes more than leanvocab.
- Rows that begin with *limit* are no programs: they are the least that the work could take on that machine.
- A benchmark keeps to a time budget by taking fewer rounds, and leaves out what would go over it.
- Memory is the growth of anonymous bytes in a fresh process, unless the table says otherwise; pages of mapped files, which the
  kernel can drop, are in *resident*.
- Models have published sizes and random weights; data sets of ids follow Zipf's law.
"""


def latest(results: Iterable[Result]) -> list[Result]:
    """The last result of each benchmark, subject and hardware, in the order of their names."""
    found: dict[tuple[str, str, str], Result] = {}
    for result in sorted(results, key=lambda each: each.date):
        found[result.benchmark, result.subject, result.hardware] = result
    return [found[key] for key in sorted(found)]


def read_all(folder: Path) -> list[Result]:
    return latest(Result.read(path) for path in sorted(folder.glob("*.json")))


def render(abouts: Sequence[About], results: Sequence[Result], plots: str = "figures") -> str:
    """The whole page."""
    parts = [_HEAD, _budgets(abouts), _verdicts(results), _better(results)]
    parts += [_section(about, [each for each in results if each.benchmark == about.name], plots) for about in abouts]
    return "\n".join(part.strip("\n") + "\n" for part in parts if part)


def _budgets(abouts: Sequence[About]) -> str:
    rows = [
        [f"[{each.name}](#{each.name})", each.measures, each.beside, each.limit, f"{each.budget_seconds:.0f} s"]
        for each in abouts
    ]
    return "## What is measured\n\n" + table(["", "what", "beside", "limit", "budget"], rows)


def _verdicts(results: Sequence[Result]) -> str:
    rows = [
        [result.title, *row]
        for result in results
        for row, figure in zip(figure_rows(result.figures), result.figures, strict=True)
        if figure.bar is not None
    ]
    return "## The bars\n\n" + (table(["", "what", "figure", "at most", ""], rows) if rows else "No results yet.\n")


def _better(results: Sequence[Result]) -> str:
    rows = [[result.title, *row] for result in results for row in where_a_peer_is_better(result.series)]
    found = (
        table(["", "measure", "program", "what it takes of leanvocab's"], rows)
        if rows
        else "Nowhere in these results.\n"
    )
    return f"## Where a peer is better\n\nBy more than 2 %; programs that do less work are in the list too.\n\n{found}"


def _section(about: About, results: Sequence[Result], plots: str) -> str:
    lines = [f"## {about.name}", "", f"{about.measures} Limit: {about.limit}.", ""]
    if not results:
        lines.append("Open: there is no result yet.")
    for result in results:
        lines += result_lines(result, plots)
    if not any(result.device == "cuda" for result in results) and about.name in ("training_step", "output_side"):
        lines.append("On CUDA: open, no GPU was there. `--device cuda` measures it.")
    return "\n".join(lines)


def result_lines(result: Result, plots: str | None = None) -> Iterator[str]:
    """Lines of one result, with its plot where there is a folder of plots."""
    machine = ", ".join(f"{name} {value}" for name, value in result.machine.items())
    yield from (f"### {result.title}", "", f"{result.date}, {result.seconds:.0f} s. {machine}.", "")
    if plots is not None and plotted(result):
        yield from (f"![{result.title}]({plots}/{plot_name(result)})", "")
    for measure, columns, rows in compared(result.series):
        yield from (table([measure, *columns[1:]], rows), "")
    if result.figures:
        yield from (table(["what", "figure", "at most", ""], figure_rows(result.figures)), "")
    if result.note:
        yield from (result.note, "")
    for reason in result.open:
        yield f"- {reason if ': open' in reason else f'open: {reason}'}"
    yield ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def plot_name(result: Result) -> str:
    return f"performance-{result.file_name.removesuffix(f'--{result.date}.json')}.svg"


def plotted(result: Result) -> list[Series]:
    """Series that a result's plot shows: its first measure."""
    return [each for each in result.series if each.measure == result.series[0].measure]


def plot(result: Result, folder: Path) -> Path | None:
    """Points of the medians with minimum and maximum, a group a case, on a logarithmic axis; None where there is nothing.

    No bars: on a logarithmic axis their length says nothing, since it has no zero to begin at.
    """
    series = plotted(result)
    if not series:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter

    cases = list(dict.fromkeys(each.case for each in series))
    names = list(dict.fromkeys(each.who for each in series))
    with plt.rc_context({"svg.hashsalt": "leanvocab", "svg.fonttype": "none"}):
        figure, axes = plt.subplots(figsize=(9, 1.2 + 0.16 * len(series) + 0.3 * len(cases)), layout="constrained")
        for number, who in enumerate(names):
            _points(axes, [each for each in series if each.who == who], cases, number, len(names))
        axes.set_yticks(range(len(cases)), cases)
        for edge in range(1, len(cases)):
            axes.axhline(edge - 0.5, color="0.85", linewidth=0.7)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(LogFormatter())  # 20, and not 2 × 10^1
        axes.xaxis.set_minor_formatter(LogFormatter())
        axes.set_xlabel(f"{series[0].measure} ({series[0].unit}, logarithmic; less is better)")
        axes.set_title(_wrapped(result), loc="left", fontsize="medium")
        axes.grid(axis="x", color="0.9", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", fontsize="small", frameon=False)
        path = folder / plot_name(result)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
    return path


def _wrapped(result: Result) -> str:
    """The title of a plot, and under it what its figures leave out."""
    return "\n".join([result.title, *textwrap.wrap(result.note, 130)])


def _points(axes: object, series: Sequence[Series], cases: list[str], number: int, num_names: int) -> None:
    """One program's points; leanvocab's are in one strong colour, limits hollow."""
    thick = 0.8 / num_names
    who = series[0].who
    heights = [cases.index(each.case) - 0.4 + thick * (number + 0.5) for each in series]
    medians = [each.median for each in series]
    low = [each.median - min(each.values) for each in series]
    high = [max(each.values) - each.median for each in series]
    is_limit = series[0].is_limit
    colour = "C3" if who.startswith(OURS) else "0.5" if is_limit else f"C{(0, 1, 2, 4, 5, 6, 7, 8, 9)[number % 9]}"
    axes.errorbar(  # type: ignore[attr-defined]
        medians,
        heights,
        xerr=[low, high],
        label=who,
        color=colour,
        marker="o" if who == OURS else "s" if who.startswith(OURS) else "|" if is_limit else "D",
        markerfacecolor="none" if is_limit else colour,
        markersize=4,
        linestyle="none",
        elinewidth=0.7,
    )


def main(abouts: Sequence[About], arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    results = read_all(options.results)
    folder = options.page.parent / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("performance-*.svg"):
        old.unlink()
    for result in results:
        plot(result, folder)
    options.page.write_text(render(abouts, results))
    (options.page.parent / SUMMARY).write_text(render_summary(results))
    print(f"{options.page}: {len(results)} results")
    return 0
