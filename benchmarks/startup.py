"""Seconds of `import leanvocab`, `leanvocab --help` and `leanvocab estimate FOLDER`, beside an empty typer app; interleaved, in
fresh processes."""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from benchmarks._command import About, finish, parser, read_options
from benchmarks._results import Figure, Result, Series
from benchmarks._rounds import Budget, take_turns

ABOUT = About(
    name="startup",
    measures="Importing leanvocab, asking its command for help, and an estimate of a folder with a checkpoint: time.",
    beside="an empty typer app",
    limit="the empty app's time, and 0.1 s; 1.5 × the time of --help for an estimate",
    budget_seconds=20,
)
EMPTY, HELP = "an empty typer app, --help", "leanvocab --help"
ESTIMATE = "leanvocab estimate FOLDER"
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


def save_checkpoint(folder: str) -> None:
    """XLM-R base as it is on the hub, a masked language model, but narrower."""
    import transformers

    config = transformers.XLMRobertaConfig(
        vocab_size=250_002, hidden_size=48, intermediate_size=96, max_position_embeddings=514, pad_token_id=1
    )
    transformers.XLMRobertaForMaskedLM(config).save_pretrained(folder)


def measure(options: argparse.Namespace) -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(folder)
        code = _HELP.replace("'--help'", f"'estimate', {folder!r}, '--rows', '6000'")
        yield from _measured(options, CASES | {ESTIMATE: code})


def _measured(options: argparse.Namespace, cases: dict[str, str]) -> Iterator[Result]:
    budget = Budget(options.seconds)
    programs = {name: lambda code=code: run(code) for name, code in cases.items()}
    if options.size == "full":
        take_turns(programs, 1, budget)  # warms the disk cache
    seconds = take_turns(programs, options.rounds or 15, budget)
    more = statistics.median(ours - empty for ours, empty in zip(seconds[HELP], seconds[EMPTY], strict=True))
    ratio = statistics.median(its / help_ for its, help_ in zip(seconds[ESTIMATE], seconds[HELP], strict=True))
    yield Result(
        ABOUT.name,
        "Starting up",
        "command line",
        "cpu",
        tuple(Series("time", "a fresh process", name, tuple(values), "s") for name, values in seconds.items()),
        (
            Figure("leanvocab --help, more than the empty app", more, "s", bar=0.1),
            Figure("leanvocab estimate FOLDER, over --help", ratio, "×", bar=1.5),
        ),
        (),
        budget.spent,
        options.seconds,
    )


def main(arguments: list[str] | None = None) -> list[Result]:
    options = read_options(parser(ABOUT), arguments)
    return finish(measure(options), options)


if __name__ == "__main__":
    main()
