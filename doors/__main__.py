"""`python -m doors [--only TEXT] [--fast] [--gpu] [--json] [--list] [--table]`: run the combinations, and write the table."""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path

from doors import table
from doors.registry import Door, all_doors, problem
from doors.results import read_results, result_of, write_result


def main(arguments: list[str]) -> int:
    """The number of doors that did not give what they expect."""
    parser = argparse.ArgumentParser(prog="python -m doors", description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="doors whose name contains this; repeatable")
    parser.add_argument("--fast", action="store_true", help="only those that `make test` runs")
    parser.add_argument("--gpu", action="store_true", help="only those that need a GPU")
    parser.add_argument("--json", action="store_true", help="results as JSON lines")
    parser.add_argument("--list", action="store_true", help="names alone; run nothing")
    parser.add_argument(
        "--table", action="store_true", help="write docs/composability.md from the results; run nothing"
    )
    parser.add_argument("--dry", action="store_true", help="keep no result")
    options = parser.parse_args(arguments)
    doors = all_doors()
    chosen = [each for each in doors if not options.only or any(text in each.name for text in options.only)]
    chosen = [each for each in chosen if each.fast or not options.fast]
    chosen = [each for each in chosen if each.gpu or not options.gpu]
    if options.list:
        print("\n".join(f"{each.name}  {each.combined}" for each in chosen))
        return 0
    if options.table:
        return _write_table(doors)
    problems = sum(_run(each, [every.name for every in doors], options) for each in chosen)
    if not options.dry:
        _write_table(doors)
    return problems


def _run(each: Door, names: list[str], options: argparse.Namespace) -> bool:
    """Runs one door, says what it gave, and keeps it; true where that is not what it expects."""
    absent = each.missing()
    if absent:
        _say(options, {"name": each.name, "skipped": absent}, f"skipped    {each.name}: {absent}")
        return False
    start, said = time.perf_counter(), io.StringIO()
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):  # the Trainer's lines
                outcome = each.run(Path(folder))
    except Exception as error:
        print(said.getvalue()[-3000:], file=sys.stderr)
        traceback.print_exc()
        _say(options, {"name": each.name, "error": str(error)}, f"FAILED     {each.name}: {type(error).__name__}")
        return True
    wrong, seconds = problem(each, outcome), time.perf_counter() - start
    result = result_of(each, outcome)
    saved = "" if outcome.saved_per_element is None else f"  saves {outcome.saved_per_element:.2f} B an element"
    line = f"{outcome.verdict:10} {each.name} ({seconds:.1f} s){saved}  {outcome.detail[:160]}"
    _say(
        options,
        {**asdict(result), "seconds": seconds, "problem": wrong},
        line + (f"\n  NOT EXPECTED: {wrong}" if wrong else ""),
    )
    if not options.dry and not wrong:
        write_result(each, result, names)
    return bool(wrong)


def _say(options: argparse.Namespace, entry: dict[str, object], line: str) -> None:
    print(json.dumps(entry, ensure_ascii=False) if options.json else line, flush=True)


def _write_table(doors: list[Door]) -> int:
    table.PAGE.write_text(table.rendered(table.PAGE.read_text(), doors, read_results()))
    return 0


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 100))
