"""Seconds of `import leanvocab` and `leanvocab --help`, beside an empty typer app; interleaved, in fresh processes."""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator

from benchmarks._command import About, finish, parser, read_options
from benchmarks._results import Figure, Result, Series
from benchmarks._rounds import Budget, take_turns

ABOUT = About(
    name="startup",
    measures="Importing leanvocab and asking its command for help: time.",
    beside="an empty typer app",
    limit="the empty app's time, and 0.1 s",
    budget_seconds=20,
)
EMPTY, HELP = "an empty typer app, --help", "leanvocab --help"
_HELP = "import sys; sys.argv = ['leanvocab', '--help']; from leanvocab.cli import main; main()"
CASES = {
    "python, nothing imported": "pass",
    "import leanvocab": "import leanvocab",
    EMPTY: "import typer; app = typer.Typer(); app.command()(lambda: None); app(['--help'])",
    HELP: _HELP,
    "leanvocab finetune --help": _HELP.replace("'--help'", "'finetune', '--help'"),
}


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def measure(options: argparse.Namespace) -> Iterator[Result]:
    budget = Budget(options.seconds)
    programs = {name: lambda code=code: run(code) for name, code in CASES.items()}
    if options.size == "full":
        take_turns(programs, 1, budget)  # warms the disk cache
    seconds = take_turns(programs, options.rounds or 15, budget)
    more = statistics.median(ours - empty for ours, empty in zip(seconds[HELP], seconds[EMPTY], strict=True))
    yield Result(
        ABOUT.name,
        "Starting up",
        "command line",
        "cpu",
        tuple(Series("time", "a fresh process", name, tuple(values), "s") for name, values in seconds.items()),
        (Figure("leanvocab --help, more than the empty app", more, "s", bar=0.1),),
        (),
        budget.spent,
        options.seconds,
    )


def main(arguments: list[str] | None = None) -> list[Result]:
    options = read_options(parser(ABOUT), arguments)
    return finish(measure(options), options)


if __name__ == "__main__":
    main()
