"""How long `import leanvocab` and `leanvocab --help` take, beside an empty typer app; interleaved, in fresh processes.

    python -m benchmarks.startup [--rounds 15] [--json]

Limit: `--help` takes at most 0.1 s more than the empty app's.
"""

import argparse
import statistics
import subprocess
import sys
import time

from benchmarks._results import Figure, show

_EMPTY = "import typer; app = typer.Typer(); app.command()(lambda: None); app(['--help'])"
_HELP = "import sys; sys.argv = ['leanvocab', '--help']; from leanvocab.cli import main; main()"
CASES = {
    "python, nothing imported": "pass",
    "import leanvocab": "import leanvocab",
    "an empty typer app, --help": _EMPTY,
    "leanvocab --help": _HELP,
    "leanvocab finetune --help": _HELP.replace("'--help'", "'finetune', '--help'"),
}


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds of each case in each round; the cases take turns, so that a busy machine slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for turn in range(rounds + 1):
        for name, code in CASES.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
            if turn > 0:  # the first round warms the disk cache
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    seconds = measure(arguments.rounds)
    figures = [Figure(name, statistics.median(values), "s") for name, values in seconds.items()]
    pairs = zip(seconds["leanvocab --help"], seconds["an empty typer app, --help"], strict=True)
    more = statistics.median(ours - empty for ours, empty in pairs)
    figures.append(Figure("leanvocab --help, more than the empty app", more, "s", bar=0.1))
    show("Starting up", figures, arguments.json, rounds=arguments.rounds, seconds=seconds)


if __name__ == "__main__":
    main()
