"""Draws the wings and lists the rooms in CONTRIBUTING.md, from the imports and docstrings of the source: `make figures`.

A test compares the page with what this script would write, so that neither goes stale.
"""

import ast
import re
from collections import defaultdict
from pathlib import Path

from docs.figures.written_between import write_between

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = REPOSITORY / "src" / "leanvocab"
PAGE = REPOSITORY / "CONTRIBUTING.md"
BEGIN, END = "<!-- drawn by docs/figures/draw_wings.py -->\n", "<!-- end of what was drawn -->\n"
FRONT = {"__init__", "__main__", "_version"}  # the front door imports on first use, and nothing imports it


def wings() -> dict[str, dict[str, ast.Module]]:
    """Wing → its rooms by name, parsed; a module at the top of the package is a wing of one room."""
    found: dict[str, dict[str, ast.Module]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        wing, _, room = path.relative_to(SOURCE).with_suffix("").as_posix().partition("/")
        if wing not in FRONT:
            found.setdefault(wing, {})[room or wing] = ast.parse(path.read_text())
    return found


def imported(tree: ast.Module) -> set[str]:
    """The wings that a room imports from, wherever in its code it does so."""
    names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("leanvocab.")} - FRONT


def arrows(rooms: dict[str, dict[str, ast.Module]]) -> dict[str, set[str]]:
    """Wing → the wings that it imports from."""
    return {wing: set().union(*map(imported, inside.values())) - {wing} for wing, inside in rooms.items()}


def floors(below: dict[str, set[str]]) -> dict[str, int]:
    """Wing → its floor: one above the highest wing that it imports from."""
    found: dict[str, int] = {}
    while len(found) < len(below):
        ready = {wing for wing, under in below.items() if wing not in found and under <= found.keys()}
        if not ready:
            raise ValueError(f"these wings import one another in a circle: {sorted(below.keys() - found.keys())}")
        found |= {wing: 1 + max((found[under] for under in below[wing]), default=0) for wing in ready}
    return found


def first_sentence(tree: ast.Module) -> str:
    """The first sentence of a docstring, in one line and without its full stop."""
    text = " ".join((ast.get_docstring(tree) or "").split())
    return re.split(r"(?<=[^.])\.(?: |$)", text)[0].replace("|", "\\|")


def picture(rooms: dict[str, dict[str, ast.Module]]) -> str:
    """A Mermaid diagram: a box a wing, an arrow to each wing that it imports from and reaches over no other way."""
    below = arrows(rooms)
    by_floor: dict[int, list[str]] = defaultdict(list)
    for wing, floor in floors(below).items():
        by_floor[floor].append(wing)
    lines = ["```mermaid", "flowchart TD"]
    for floor in sorted(by_floor, reverse=True):
        for wing in sorted(by_floor[floor]):
            number = len(rooms[wing].keys() - {"__init__"})
            lines.append(f'  {wing}["{wing}{f"<br/>{number} rooms" if len(rooms[wing]) > 1 else ""}"]')
    for wing in sorted(below):
        farther = set().union(*(reachable(below, under) for under in below[wing]))
        lines += [f"  {wing} --> {under}" for under in sorted(below[wing] - farther)]
    return "\n".join([*lines, "```"])


def reachable(below: dict[str, set[str]], wing: str) -> set[str]:
    """Every wing under a wing, over any number of arrows."""
    return below[wing].union(*(reachable(below, under) for under in below[wing]))


def listing(rooms: dict[str, dict[str, ast.Module]]) -> str:
    """A table of the rooms of each wing, top floor first, with what their docstrings say."""
    heights = floors(arrows(rooms))
    lines = ["| wing | room | what happens there |", "| --- | --- | --- |"]
    for wing in sorted(rooms, key=lambda wing: (-heights[wing], wing)):
        if "__init__" in rooms[wing]:
            lines.append(f"| **{wing}** | | {first_sentence(rooms[wing]['__init__'])} |")
        for room, tree in rooms[wing].items():
            if room != "__init__":
                is_alone = "__init__" not in rooms[wing]
                lines.append(f"| {f'**{wing}**' if is_alone else ''} | `{room}` | {first_sentence(tree)} |")
    return "\n".join(lines)


def drawn() -> str:
    """What stands between the marks in CONTRIBUTING.md."""
    rooms = wings()
    below = arrows(rooms)
    number = sum(map(len, below.values()))
    height = max(floors(below).values())
    return (
        f"{len(rooms)} wings, doors and ground modules on {height} floors, with {number} arrows between them; an arrow that "
        f"others imply is left out of the picture.\n\n{picture(rooms)}\n\n{listing(rooms)}\n"
    )


def main() -> None:
    """Writes the picture and the list into CONTRIBUTING.md."""
    write_between(PAGE, BEGIN, drawn(), END)


if __name__ == "__main__":
    main()
