"""docs/composability.md, written from the results."""

from pathlib import Path

from doors.registry import Door
from doors.results import Result

PAGE = Path(__file__).parents[1] / "docs" / "composability.md"
_START, _END = "<!-- rows: python -m doors --table -->", "<!-- end of rows -->"
_HEAD = (
    "| combined | same as without leanvocab | saves | what differs, or is refused, and why | CI | versions | date |\n"
)
_HEAD += "| --- | --- | --- | --- | --- | --- | --- |\n"


def rendered(page: str, doors: list[Door], results: dict[str, Result]) -> str:
    """The page with its table as the results say."""
    before, _, rest = page.partition(_START)
    _, _, after = rest.partition(_END)
    return f"{before}{_START}\n\n{table(doors, results)}\n{_END}{after}"


def table(doors: list[Door], results: dict[str, Result]) -> str:
    """A summary line, and one table a kind. A door that has not been run has no row."""
    run = [each for each in doors if each.name in results]
    count = {verdict: sum(results[each.name].verdict == verdict for each in run) for verdict in _WORDS}
    lines = [f"{len(run)} combinations were run: " + ", ".join(f"{n} {v}" for v, n in count.items() if n) + ".\n"]
    for kind in sorted({each.kind for each in run}, key=_place):
        rows = [_row(each, results[each.name]) for each in run if each.kind == kind]
        lines.append(f"### {kind.replace('_', ' ')}\n\n{_HEAD}" + "\n".join(rows) + "\n")
    return "\n".join(lines)


_ORDER = (  # what most people come for first
    "trainer", "one_line", "finetune", "peft", "qlora", "trl", "sentence_transformers", "sentence_encoders",
    "growing", "new_tokens", "loop", "distributed", "fsdp", "deepspeed", "checkpoints", "optimizers", "ray",
)  # fmt: skip


def _place(kind: str) -> tuple[int, str]:
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER), kind


_WORDS = ("identical", "close", "different", "works", "refused")


def _row(door: Door, result: Result) -> str:
    verdict = result.verdict
    if verdict in ("close", "different") and result.difference:
        verdict += f", {result.difference:.0e}"
    saves = "" if result.saved_per_element is None else f"{result.saved_per_element:g} B"
    texts = [result.why]
    if result.verdict in ("refused", "different", "works"):
        texts.append(result.detail if len(result.detail) < 400 else result.detail[:400] + "…")
    said = ". ".join(text.rstrip(".") for text in texts if text).replace("|", "\\|").replace("\n", " ")
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    where = "" if result.device.startswith("CPU") else f", {result.device}"
    cells = (result.combined, verdict, saves, said, "yes" if door.fast else "", versions, f"{result.date}{where}")
    return f"| {' | '.join(cells)} |"
