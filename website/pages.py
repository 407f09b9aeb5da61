"""The site's pages: those of docs/, the README as the start, the files that they link to, and the two references.

A link to a file of the repository (an example, a test) leads to a page that shows that file: nothing leaves the site.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")
_IN_CODE = re.compile(r"(^(`{3,}).*?^\2$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_MERMAID = re.compile(r"^```mermaid.*?^```\n", re.MULTILINE | re.DOTALL)  # its script would come from another server
_MARKED = re.compile(r"^```python hub$", re.MULTILINE)  # a mark for the tests: such a snippet needs the hub
_LANGUAGES = {".py": "python", ".toml": "toml", ".cff": "yaml", ".yml": "yaml", ".txt": "text"}
# Pages that are made of files outside docs/.
_NAMED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "reproduction/REPORT.md": "paper.md",
}


def write_pages(folder: Path) -> None:
    """Writes every page, and the pictures, to an empty folder."""
    own = sorted((REPOSITORY / "docs").rglob("*.md"))
    waiting = [*map(Path, _NAMED), *(path.relative_to(REPOSITORY) for path in own)]
    written: set[Path] = set()
    while waiting:
        source = waiting.pop()
        if source in written:
            continue
        written.add(source)
        target = folder / _address(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix in (".svg", ".png", ".js", ".css", ".json"):
            shutil.copyfile(REPOSITORY / source, target)
            continue
        text = _text(source)
        target.write_text(_led(text, source))
        waiting += [_resolved(source, link) for link in _links(text)]
    assets = REPOSITORY / "docs" / "assets"
    if assets.is_dir():
        shutil.copytree(assets, folder / "assets", dirs_exist_ok=True)
    (folder / "api.md").write_text(_api())
    (folder / "commands.md").write_text(_commands())


def _text(source: Path) -> str:
    """Markdown of a file; of a folder, a list of what lies in it."""
    path = REPOSITORY / source
    if path.is_dir():
        listed = sorted(item.name for item in path.iterdir() if item.suffix in (*_LANGUAGES, ".md"))
        return f"# {source}\n\n" + "".join(f"- [{name}]({source.name}/{name})\n" for name in listed)
    if path.suffix == ".md":
        return _MARKED.sub("```python", _MERMAID.sub("", path.read_text()))
    return f"# {source}\n\n````{_LANGUAGES.get(path.suffix, 'text')}\n{path.read_text().rstrip()}\n````\n"


def _links(text: str) -> Iterator[str]:
    yield from (link[1] for part in _prose(text) for link in _LINK.finditer(part))


def _prose(text: str) -> Iterator[str]:
    """What stands between the code of a page."""
    end = 0
    for code in _IN_CODE.finditer(text):
        yield text[end : code.start()]
        end = code.end()
    yield text[end:]


def _led(text: str, source: Path) -> str:
    """The text with its links as they are on the site."""
    here = os.path.dirname(_address(source)) or "."

    def led(link: re.Match[str]) -> str:
        return os.path.relpath(_address(_resolved(source, link[1])), here) + (link[2] or "")

    code = [match[0] for match in _IN_CODE.finditer(text)]
    prose = [_LINK.sub(led, part) for part in _prose(text)]
    return "".join(part for pair in zip(prose, [*code, ""], strict=True) for part in pair)


def _resolved(source: Path, link: str) -> Path:
    return Path(os.path.normpath(source.parent / link))


def _address(source: Path) -> str:
    """Where a file of the repository is on the site."""
    if source.parts[0] == "docs":
        return source.relative_to("docs").as_posix()
    if source.suffix in (".svg", ".png"):
        return f"files/{source.as_posix()}"
    return _NAMED.get(source.as_posix(), f"files/{source.as_posix().removesuffix('.md')}.md")


def _api() -> str:
    """A page of directives: the docstrings themselves are read when the site is built."""
    import leanvocab

    names = [name for name in leanvocab.__all__ if not name.startswith("__")]
    head = "# API\n\nThe names of `import leanvocab`, in the order in which they are used.\n"
    return head + "".join(f"\n::: {getattr(leanvocab, name).__module__}.{name}\n" for name in names)


def _commands() -> str:
    """The help of every command, as typer writes it."""
    import click
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from leanvocab.cli import main

    command = get_command(main)
    with click.Context(command, info_name="leanvocab") as context:
        text = get_docs_for_click(obj=command, ctx=context, name="leanvocab", title="Command line")
    return re.sub(r"(?<!`)<(?=\w)", "&lt;", text)
