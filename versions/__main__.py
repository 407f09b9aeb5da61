"""`python -m versions [--only TEXT] [--suite NAME] [--python COMMAND] [--table]`: run suites, keep results, write the table.

What pytest printed is kept beside the environments, in .cache/versions.
"""

import argparse
import datetime
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from versions.environments import (
    ENVIRONMENTS,
    FOLDER,
    REPOSITORY,
    Environment,
    made,
    python_of,
    surroundings,
    versions_in,
)

RESULTS = Path(__file__).parent / "results"
PAGE = REPOSITORY / "docs" / "versions.md"
START, END = "<!-- rows: python -m versions --table -->", "<!-- end of rows -->"
SUITES = {
    "architectures": ["tests/equivalence/test_architectures.py"],
    "equivalence": ["tests/equivalence"],
    "reads": ["tests/unit/test_weight_reads.py", "tests/unit/test_weight_uses.py", "tests/faults/test_permissions.py"],
    "all reads": ["tests/unit/test_reads_of_transformers.py", "-m", ""],
    "Trainer": ["tests/integration/test_trainer.py", "tests/integration/test_trainer_output.py"],
    "finetune": ["tests/integration/test_finetune.py"],
    "language models": ["tests/integration/test_language_models.py"],
    "unit": ["tests/unit"],
}


def main(arguments: list[str]) -> int:
    """The number of suites that did not pass."""
    parser = argparse.ArgumentParser(prog="python -m versions", description=__doc__)
    parser.add_argument("--only", default="", help="environments whose name contains this")
    parser.add_argument("--suite", action="append", choices=SUITES, help="suites to run; by default all")
    parser.add_argument("--python", help="a command that starts an interpreter which has all: for one environment")
    parser.add_argument("--table", action="store_true", help="write docs/versions.md from the results; run nothing")
    options = parser.parse_args(arguments)
    failed = 0
    for environment in ENVIRONMENTS if not options.table else ():
        if options.only in environment.name:
            failed += _run(environment, options.suite or list(SUITES), options.python)
    PAGE.write_text(rendered(PAGE.read_text(), results()))
    return failed


def _run(environment: Environment, suites: list[str], command: str | None) -> int:
    """Runs suites in an environment, and keeps what each gave; the number of those that did not pass."""
    problem = None if command else made(environment)
    if problem is not None:
        print(f"skipped  {environment.name}: {problem}")
        return 0
    python = shlex.split(command) if command else [str(python_of(environment))]
    result = results().get(environment.name, {"suites": {}})
    result["versions"] = versions_in(python)
    failed = 0
    for suite in suites:
        marks = [] if "-m" in SUITES[suite] else ["-m", "not slow"]
        pytest = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "900", *SUITES[suite], *marks]
        ended = subprocess.run(
            pytest, cwd=REPOSITORY, env=surroundings(), capture_output=True, text=True, check=False, errors="replace"
        )
        told = outcome(ended.stdout)
        result["suites"][suite] = {"outcome": told, "date": datetime.date.today().isoformat()}
        print(f"{'passed ' if ended.returncode == 0 else 'FAILED '}  {environment.name}, {suite}: {told}", flush=True)
        if ended.returncode:
            failed += 1
            print(*re.findall(r"^(?:FAILED|ERROR) .*", ended.stdout, re.MULTILINE), sep="\n", flush=True)
        FOLDER.mkdir(parents=True, exist_ok=True)
        log = FOLDER / f"{environment.name}--{suite.replace(' ', '-')}.log"
        log.write_text(ended.stdout + ended.stderr, encoding="utf-8")
        path = RESULTS / f"{environment.name}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
    return failed


def outcome(output: str) -> str:
    """The numbers in pytest's last line, without what was not chosen."""
    numbers = re.findall(r"\d+ (?:failed|passed|skipped|xfailed|errors?)", (output.strip().splitlines() or [""])[-1])
    return ", ".join(numbers) or "no result"


def results() -> dict[str, Any]:
    """What was kept of each environment, by its name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def rendered(page: str, kept: dict[str, Any]) -> str:
    """The page with its table as the results say: a row an environment; a suite that was not run has an empty cell."""
    before, _, rest = page.partition(START)
    suites = [suite for suite in SUITES if any(suite in result["suites"] for result in kept.values())]
    columns = ["environment", "versions", *suites, "last run"]
    rows = [columns, ["---"] * len(columns)]
    rows += [_row(each, suites, kept[each.name]) for each in ENVIRONMENTS if each.name in kept]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return f"{before}{START}\n\n{table}\n{END}{rest.partition(END)[2]}"


def _row(environment: Environment, suites: list[str], result: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    outcomes = [result["suites"].get(suite, {}).get("outcome", "") for suite in suites]
    last = max(given["date"] for given in result["suites"].values())
    return [f"{environment.name} ({environment.why})", versions, *outcomes, last]


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
