"""Parts that every benchmark's command line shares."""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks._paper import PAPER
from benchmarks._results import FOLDER, Result
from benchmarks._tables import compared, figure_rows

PEERS = Path(__file__).resolve().parents[1] / ".cache" / "peers"


@dataclass(frozen=True)
class About:
    """Description of a benchmark: shown by `python -m benchmarks`, by its `--help`, and in docs/performance.md."""

    name: str
    measures: str
    beside: str
    limit: str
    budget_seconds: float  # in full size on two cores; the benchmark keeps to it by taking fewer rounds

    def __str__(self) -> str:
        return (
            f"{self.measures}\nbeside  {self.beside}\nlimit   {self.limit}\n"
            f"budget  {self.budget_seconds:.0f} s in full size"
        )


def parser(about: About, *, counts: bool = False) -> argparse.ArgumentParser:
    """A parser with the common options; those of peers and devices do nothing where a benchmark has no use for them.

    Args:
        counts: the benchmark can count its bytes on paper.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks {about.name}",
        description=str(about),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--size", choices=("full", "small"), default="full", help="small: a few seconds, to see it work")
    made.add_argument("--seconds", type=float, help=f"time budget ({about.budget_seconds:.0f}; small size: a tenth)")
    made.add_argument("--rounds", type=int, help="at most so many rounds")
    made.add_argument("--json", action="store_true", help="print one JSON object a result instead of tables")
    made.add_argument(
        "--results", type=Path, help="folder for result files (benchmarks/results; small size: not written)"
    )
    devices = ("cpu", "cuda", PAPER) if counts else ("cpu", "cuda")
    made.add_argument("--no-results", action="store_true", help="write no result files")
    made.add_argument("--device", choices=devices, default="cpu", help="paper: bytes on a GPU, counted without one")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    made.add_argument(
        "--authors-code",
        type=Path,
        default=_there("authors"),
        help="checkout of mlsw/partial-embedding-matrix-adaptation (.cache/peers/authors where it is there)",
    )
    made.add_argument(
        "--smaller-vocab-python",
        type=Path,
        default=_there("smaller-vocab/bin/python"),
        help="interpreter that has transformer-smaller-training-vocab (of the environment in .cache/peers/smaller-vocab)",
    )
    made.add_argument(
        "--torchao",
        type=Path,
        default=_there("torchao"),
        help="folder that holds torchao, for 8-bit Adam and offload (.cache/peers/torchao)",
    )
    made.add_argument("--no-peers", action="store_true", help="without the authors' code and packages of .cache/peers")
    made.set_defaults(about=about)
    return made


def _there(name: str) -> Path | None:
    """Path that `make peers` has made, None where it has not."""
    path = PEERS / name
    return path if path.exists() else None


def read_options(made: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Options with defaults by size filled in."""
    options = made.parse_args(arguments)
    budget = options.about.budget_seconds
    options.seconds = options.seconds or (budget if options.size == "full" else budget / 10)
    if options.no_peers:
        options.authors_code = options.smaller_vocab_python = options.torchao = None
    if options.results is None and options.size == "full" and not options.no_results:
        options.results = FOLDER
    return options


def finish(results: Iterable[Result], options: argparse.Namespace) -> list[Result]:
    """Prints results as they come, as tables or one JSON object a line, and writes their files."""
    done = []
    for result in results:
        done.append(result)
        if options.json:
            print(json.dumps(result.to_dict()), flush=True)
        else:
            show(result)
        if options.results is not None:
            path = result.write(options.results)
            print(f"written: {path}", file=sys.stderr)
    return done


def show(result: Result) -> None:
    """One table a measure, then the figures beside their bars, then what is open."""
    console = Console(width=160)
    console.rule(result.title)
    for measure, columns, rows in compared(result.series):
        table = Table(*columns, title=measure)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if result.figures:
        table = Table("what", "figure", "at most", "")
        for row in figure_rows(result.figures):
            table.add_row(*row)
        console.print(table)
    if result.note:
        console.print(result.note, markup=False)
    for reason in result.open:
        console.print(f"open: {reason}", markup=False)
    console.print(", ".join(f"{name} {value}" for name, value in result.machine.items()), style="dim", markup=False)
