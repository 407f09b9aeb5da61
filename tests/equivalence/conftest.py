"""Prints how many pairs of architecture and task held, why others did not, and how often norms were rounded apart."""

from collections import Counter, defaultdict
from typing import Any

import pytest

_pairs: dict[str, pytest.TestReport] = {}  # of one session: pair → its report
_tied: list[str] = []  # how many tied models were refused, by task
_norms: dict[bool, list[tuple[float, float]]] = defaultdict(list)  # whether the dimension is a multiple of 16 → norms
_cases: dict[str, pytest.TestReport] = {}  # pair, tied or untied, mode → its report
_composites: dict[str, pytest.TestReport] = {}  # pair → its report
_COMPOSITE_TEST = "test_a_shrunk_composite_computes_trains_generates_saves_and_merges_as_the_full_one["
_CASE_TEST = "test_a_partial_output_layer_computes_trains_generates_saves_and_merges_as_the_full_one_masked["
_PAIR_TEST = "test_a_shrunk_model_computes_trains_saves_and_merges_as_the_full_one["


@pytest.fixture
def repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, and no seed that is drawn."""
    import torch  # only where these tests run

    torch.set_num_threads(1)
    monkeypatch.setattr(torch, "seed", lambda: torch.manual_seed(1).initial_seed())  # Reformer draws new hashes with it


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.rpartition("::")[2]
    if name.startswith(_PAIR_TEST) and (report.when == "call" or report.outcome == "skipped"):
        _pairs[name[len(_PAIR_TEST) : -1]] = report
    if name.startswith(_CASE_TEST) and (report.when == "call" or report.outcome == "skipped"):
        _cases[name[len(_CASE_TEST) : -1]] = report
    if name.startswith(_COMPOSITE_TEST) and (report.when == "call" or report.outcome == "skipped"):
        _composites[name[len(_COMPOSITE_TEST) : -1]] = report
    properties: dict[str, Any] = dict(report.user_properties) if report.when == "call" else {}
    if "norms" in properties:
        is_multiple, norms = properties["norms"]
        _norms[is_multiple] += norms
    if "tied" in properties:
        _tied.append(properties["tied"])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _pairs:
        terminalreporter.section("architectures: shrunk beside full, bit for bit")
        for line in _lines_on_pairs():
            terminalreporter.write_line(line)
    if _tied:
        terminalreporter.write_line(f"models with a tied output layer that were refused: {', '.join(_tied)}")
    if _cases:
        terminalreporter.section("output layers: frozen and restricted beside the full model, masked")
        for line in _lines_on_cases():
            terminalreporter.write_line(line)
    if _composites:
        terminalreporter.section("composites: shrunk beside full, bit for bit")
        for line in _lines_on_composites():
            terminalreporter.write_line(line)
    if _norms:
        terminalreporter.section("training with clipping: gradient norms, shrunk beside full")
        for line in _lines_on_norms():
            terminalreporter.write_line(line)


def _lines_on_pairs() -> list[str]:
    tasks: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[str, list[str]] = defaultdict(list)
    flags: dict[str, Counter[bool]] = defaultdict(Counter)
    for name, report in _pairs.items():
        properties: dict[str, Any] = dict(report.user_properties)
        outcome, reason = _outcome(report, properties)
        tasks[next(task for task in _tasks() if name.endswith(task))][outcome] += 1
        if reason:
            reasons[f"{outcome}: {reason}"].append(name)
        for flag in ("equal_norms", "dropout"):
            flags[flag].update(properties.get(flag, []))
    total: Counter[str] = sum(tasks.values(), Counter())
    lines = []
    for task, counted in [*tasks.items(), ("all", total)]:
        others = ", ".join(f"{number} {outcome}" for outcome, number in counted.items() if outcome != "held")
        lines.append(f"{task:24} {counted['held']:3} of {counted.total():3} held{others and '; ' + others}")
    lines.append(
        f"gradient norms equal to the last bit in {flags['equal_norms'][True]} of {flags['equal_norms'].total()} steps"
    )
    lines.append(
        f"dropout (or another draw of chance) was on in {flags['dropout'][True]} of {flags['dropout'].total()} models"
    )
    return lines + [f"{reason}\n    {' '.join(names)}" for reason, names in reasons.items()]


def _lines_on_cases() -> list[str]:
    """Numbers of cases that held, by task, tie and mode; and what is true of some architectures alone."""
    held: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    notes: dict[str, set[str]] = defaultdict(set)
    for name, report in _cases.items():
        pair, tie, mode = name.rsplit("-", 2)
        properties: dict[str, Any] = dict(report.user_properties)
        outcome, reason = _outcome(report, properties)
        held[tie, mode, next(task for task in _tasks() if pair.endswith(task))][outcome] += 1
        if reason:
            notes[f"{outcome}: {reason}"].add(pair)
        if properties.get("looked_at"):
            notes[f"the full logits are made in training, by {', '.join(properties['looked_at'])}"].add(pair)
        if properties.get("generates"):
            notes[f"not generated with: {properties['generates']}"].add(pair)
    lines = []
    for tie, mode in sorted({key[:2] for key in held}):
        for task, counted in [(key[2], counted) for key, counted in held.items() if key[:2] == (tie, mode)]:
            others = ", ".join(f"{number} {outcome}" for outcome, number in counted.items() if outcome != "held")
            lines.append(
                f"{tie:8} {mode:12} {task:12} {counted['held']:3} of {counted.total():3} held{others and '; ' + others}"
            )
    return lines + [f"{note}\n    {' '.join(sorted(pairs))}" for note, pairs in notes.items()]


def _lines_on_composites() -> list[str]:
    """Numbers of composites that held, by task, with how many of them on text alone and on a mixed batch."""
    from composites import COMPOSITE_CLASSES  # only where these tests run: it imports transformers

    tasks: dict[str, Counter[str]] = defaultdict(Counter)
    notes: dict[str, list[str]] = defaultdict(list)
    for name, report in _composites.items():
        properties: dict[str, Any] = dict(report.user_properties)
        outcome, reason = _outcome(report, properties)
        task = next(task for task in COMPOSITE_CLASSES if name.endswith(task))
        tasks[task].update([outcome, *(properties["batches"] if outcome == "held" else [])])
        if reason:
            notes[f"{outcome}: {reason}"].append(name)
        if properties.get("not_generated"):
            notes[f"not generated with: {properties['not_generated']}"].append(name)
    lines = []
    for task, counted in [*tasks.items(), ("all", sum(tasks.values(), Counter()))]:
        others = "".join(f"; {counted[each]} {each}" for each in ("refused", "not built", "failed") if counted[each])
        held = f"held: {counted['text']} on text, {counted['mixed']} on a mixed batch"
        number = sum(counted[each] for each in ("held", "refused", "not built", "failed"))
        lines.append(f"{task:24} {counted['held']:3} of {number:3} {held}{others}")
    return lines + [f"{note}\n    {' '.join(names)}" for note, names in notes.items()]


def _lines_on_norms() -> list[str]:
    lines = []
    for is_multiple, norms in _norms.items():
        different = [abs(full - lean) / full for full, lean in norms if full != lean]
        which = "a multiple of 16" if is_multiple else "other"
        largest = f", relative difference at most {max(different):.1e}" if different else ""
        lines.append(f"dimension {which}: rounded otherwise in {len(different)} of {len(norms)} steps{largest}")
    return lines


def _tasks() -> list[str]:
    from tiny_models import AUTO_CLASSES  # only where these tests run: it imports transformers

    return list(AUTO_CLASSES)


def _outcome(report: pytest.TestReport, properties: dict[str, Any]) -> tuple[str, str]:
    if report.outcome == "skipped":
        return "not built", str(report.longrepr[2]).removeprefix("Skipped: not built: ")  # type: ignore[index]
    if report.outcome == "failed":
        return "failed", str(report.longrepr.reprcrash.message).splitlines()[0]  # type: ignore[union-attr]
    return ("refused", properties["refused"]) if "refused" in properties else ("held", "")
