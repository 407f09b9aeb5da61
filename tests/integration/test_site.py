"""The site is built without network, a warning or a dead link, and its reference says what each public name needs."""

import html
import inspect
import re
from pathlib import Path

import pytest

import leanvocab
from website.__main__ import main
from website.links import dead_links

NAMES = [name for name in leanvocab.__all__ if not name.startswith("__")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("zensical", reason="the site is built with leanvocab[site]")
    folder = tmp_path_factory.mktemp("site") / "built"
    assert main(folder) == 0
    return folder / "site"


def text_of(page: Path) -> str:
    without_code = re.sub(r"<(script|style).*?</\1>", "", page.read_text(), flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", " ", without_code))


def test_every_page_of_the_navigation_is_there_and_the_start_is_the_readme(site: Path) -> None:
    start = text_of(site / "index.html")
    assert "Get the whole model back, bit for bit" in start
    for page in ("training", "calculator", "models", "api", "commands", "performance", "decisions/index"):
        assert (site / f"{page}.html").exists(), page


def test_a_page_asks_no_other_server_for_anything(site: Path) -> None:
    fetched = re.compile(r"""(?:src|href)=["'](https?:[^"']+)["']""")
    for page in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|img|link|iframe)\b[^>]*>", page.read_text()):
            assert not fetched.search(tag) or 'rel="canonical"' in tag, f"{page.name}: {tag}"


def test_every_public_name_has_its_place_in_the_reference(site: Path) -> None:
    page = (site / "api.html").read_text()
    headings = re.findall(r'<h2 id="([\w.]+)"', page)
    assert [heading.rpartition(".")[2] for heading in headings] == NAMES


def test_every_public_name_says_its_errors_and_its_source() -> None:
    for name in NAMES:
        about = inspect.getdoc(getattr(leanvocab, name)) or ""
        if name != "LeanVocabError":  # the base of the errors themselves
            assert re.search(r"^Raises(:$| nothing: )", about, re.MULTILINE), name
            assert re.search(r"^Source: ", about, re.MULTILINE), name


def test_the_reference_of_the_commands_has_every_option(site: Path) -> None:
    page = text_of(site / "commands.html")
    for words in (
        "leanvocab finetune",
        "--full-vocabulary",
        "leanvocab merge",
        "--verify",
        "leanvocab count",
        "--tokenizer",
    ):
        assert words in page


def test_examples_are_shown_whole(site: Path) -> None:
    shown = text_of(site / "files" / "examples" / "lora.py.html")
    assert "get_peft_model" in shown


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="sub/b.html#there">x</a><a href="#top">x</a><a href="https://example.org">x</a>'
    )
    (tmp_path / "sub" / "b.html").write_text(
        '<h1 id="there"></h1><a href="../a.html#gone">x</a><a href="c.html">x</a><img src="https://x.org/y.png">'
    )
    assert dead_links(tmp_path) == [
        "sub/b.html: ../a.html#gone",
        "sub/b.html: c.html",
        "sub/b.html: https://x.org/y.png",
    ]
