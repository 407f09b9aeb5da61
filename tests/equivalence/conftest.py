"""Prints how many pairs of architecture and task held, and why others did not."""

from collections import Counter, defaultdict
from typing import Any

import pytest

_reports: dict[str, pytest.TestReport] = {}  # of one session: pair → its report
_TEST = "test_a_shrunk_model_computes_trains_saves_and_merges_as_the_full_one["


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.rpartition("::")[2]
    if name.startswith(_TEST) and (report.when == "call" or report.outcome == "skipped"):
        _reports[name[len(_TEST) : -1]] = report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _reports:
        return
    tasks: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[str, list[str]] = defaultdict(list)
    norms: Counter[bool] = Counter()
    for name, report in _reports.items():
        properties = dict(report.user_properties)
        outcome, reason = _outcome(report, properties)
        tasks[next(task for task in _tasks() if name.endswith(task))][outcome] += 1
        norms.update(properties.get("equal_norms", []))
        if reason:
            reasons[f"{outcome}: {reason}"].append(name)
    terminalreporter.section("architectures: shrunk beside full, bit for bit")
    total: Counter[str] = sum(tasks.values(), Counter())
    for task, counted in [*tasks.items(), ("all", total)]:
        others = ", ".join(f"{number} {outcome}" for outcome, number in counted.items() if outcome != "held")
        terminalreporter.write_line(f"{task:24} {counted['held']:3} of {counted.total():3} held{others and '; ' + others}")
    terminalreporter.write_line(f"gradient norms equal to the last bit: {norms[True]} of {norms.total()} steps")
    for reason, names in reasons.items():
        terminalreporter.write_line(f"{reason}\n    {' '.join(names)}")


def _tasks() -> list[str]:
    from tiny_models import AUTO_CLASSES  # only where these tests run: it imports transformers

    return list(AUTO_CLASSES)


def _outcome(report: pytest.TestReport, properties: dict[str, Any]) -> tuple[str, str]:
    if report.outcome == "skipped":
        return "not built", str(report.longrepr[2]).removeprefix("Skipped: not built: ")  # type: ignore[index]
    if report.outcome == "failed":
        return "failed", str(report.longrepr.reprcrash.message).splitlines()[0]  # type: ignore[union-attr]
    return ("refused", properties["refused"]) if "refused" in properties else ("held", "")
