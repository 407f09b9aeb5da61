"""Links of built pages that lead nowhere, or to another server for what a page itself needs."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_NEEDED = {"img", "link", "script", "iframe", "source"}  # what a browser fetches by itself


class _Page(HTMLParser):
    """The anchors of a page, and (tag, address) of everything that it refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.references: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := given.get(name))}
        is_canonical = tag == "link" and given.get("rel") in ("canonical", "alternate")
        for name in ("href", "src"):
            if (value := given.get(name)) and not is_canonical:
                self.references.append((tag, value))


def dead_links(site: Path) -> list[str]:
    """Of a folder of HTML: 'page: address' of each reference without a file or an anchor, and of what comes from elsewhere."""
    pages = {path: _read(path) for path in sorted(site.rglob("*.html"))}
    dead = []
    for path, page in pages.items():
        for tag, address in page.references:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                is_dead = tag in _NEEDED and parts.scheme != "data"
            else:
                target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
                target = site / parts.path.lstrip("/") if parts.path.startswith("/") else target
                target = target / "index.html" if target.is_dir() else target
                known = pages.get(target)
                is_dead = not target.exists() or bool(parts.fragment and known and parts.fragment not in known.anchors)
            if is_dead:
                dead.append(f"{path.relative_to(site)}: {address}")
    return sorted(set(dead))


def _read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text())
    return page
