"""A part of a page that is drawn from the code: what stands between two marks."""

from pathlib import Path


def write_between(page: Path, begin: str, drawn: str, end: str) -> None:
    """Writes what was drawn in the place of what stands between the marks, and says where."""
    head, _, rest = page.read_text().partition(begin)
    page.write_text(f"{head}{begin}{drawn}{end}{rest.partition(end)[2]}")
    print(page)
