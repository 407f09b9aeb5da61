"""A report of one's own data: its numbers against naive ones, and a page that asks for nothing and hides nothing."""

import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import transformers
from texts import small_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import leanvocab as lv
from leanvocab.errors import CheckpointError, SettingsError
from leanvocab.reports.data_report import RunReport, report_on_data
from leanvocab.reports.html_report import check_page, page, write_report

FULL_SIZE = 310


def ids_of(seed, low, high, num_tokens=4000):
    """Ids by Zipf's law over a range."""
    chance = np.random.default_rng(seed)
    return np.minimum(low + chance.zipf(1.3, num_tokens) - 1, high - 1).tolist()


DATA = {
    "train": ids_of(0, 5, 200),
    "validation": ids_of(1, 50, 260, 700),
    "test": ids_of(2, 20, 210, 500),
}


def counted(data=DATA, full_size=None):
    return {name: lv.count_tokens([ids], full_size=full_size) for name, ids in data.items()}


def estimate():
    config = transformers.BertConfig(
        vocab_size=FULL_SIZE, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return lv.estimate_memory(config, 120)


def run_of(num_steps=40):
    return RunReport(
        num_steps=num_steps,
        losses=tuple((step, 2.0 / step + 0.125) for step in range(4, num_steps + 1, 4)),
        validations=((20, {"loss": 0.75, "f1": 0.5}), (40, {"loss": 0.625, "f1": 0.8125})),
        scores={"loss": 0.625, "f1": 0.8125},
        seconds={"training": 12.25, "tokenizing": 0.5},
        peak_bytes={"peak, resident": 123_456_789},
    )


def whole_report(**others):
    usual = {
        "tokenizer": small_tokenizer(),
        "title": "Vocabulary of reviews.csv",
        "memory": estimate(),
        "run": run_of(),
        "kept_rows": 250,
    }
    return report_on_data(counted(), full_size=FULL_SIZE, **usual | others)


class Page(HTMLParser):
    """A parsed page: its text, the values of its numbers, its tags with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.values, self.texts, self._open = [], [], [], []
        self.feed(text)
        assert self._open == []  # what was opened was closed, in order

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "data":
            self.values.append(float(dict(attributes)["value"]))
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_coverage_and_frequent_tokens_are_those_of_a_sorted_count():
    every = Counter(id for ids in DATA.values() for id in ids)
    by_rank = sorted(every.values(), reverse=True)
    report = whole_report()
    assert (report.num_tokens, report.full_rows, report.used_rows) == (sum(by_rank), FULL_SIZE, len(by_rank))
    assert report.once_rows == by_rank.count(1)
    assert all(point == (rank, by_rank[rank - 1], sum(by_rank[:rank])) for point in report.curve for rank in point[:1])
    assert [report.curve[0][0], report.curve[-1][0]] == [1, len(by_rank)]
    for percent, num_rows in report.rows_to_cover.items():
        assert sum(by_rank[: num_rows - 1]) * 100 < percent * sum(by_rank) <= sum(by_rank[:num_rows]) * 100
    expected = sorted(every.items(), key=lambda pair: (-pair[1], pair[0]))[: len(report.most_frequent)]
    assert [(use.token_id, use.count) for use in report.most_frequent] == expected
    assert report.most_frequent[0].token == small_tokenizer().convert_ids_to_tokens(expected[0][0])


def test_splits_say_what_training_lacks():
    report = whole_report()
    train = set(DATA["train"])
    for name, ids in DATA.items():
        split, unseen = report.splits[name], Counter(id for id in ids if id not in train)
        assert (split.num_tokens, split.used_rows) == (len(ids), len(set(ids)))
        assert (split.unseen_tokens, split.unseen_rows) == (sum(unseen.values()), len(unseen))
        first = sorted(unseen.items(), key=lambda pair: (-pair[1], pair[0]))[: len(split.most_frequent_unseen)]
        assert [(use.token_id, use.count) for use in split.most_frequent_unseen] == first
    assert report.splits["validation"].unseen_rows > 0
    assert report.splits["train"].unseen_rows == 0


def test_the_training_split_is_train_or_the_first_or_the_one_that_is_named():
    counts = counted({"one": [1], "two": [1, 2]})
    assert report_on_data(counts, full_size=5).training_split == "one"
    assert report_on_data(counts, full_size=5).splits["two"].unseen_rows == 1
    named = report_on_data(counts, full_size=5, training_split="two")
    assert named.splits["one"].unseen_rows == 0
    assert report_on_data({"other": counts["one"], "train": counts["two"]}, full_size=5).training_split == "train"


@pytest.mark.parametrize("used", [[], [0], [9], [0, 9], [4, 5], list(range(10))])
def test_unused_stretches_are_all_ids_between_used_ones(used):
    report = report_on_data({"train": lv.count_tokens([used], full_size=10)}, full_size=10)
    covered = [id for s in report.unused_stretches for id in range(s.first_id, s.last_id + 1)]
    assert sorted(covered) == sorted(set(range(10)) - set(used))
    lengths = [stretch.num_rows for stretch in report.unused_stretches]
    assert lengths == sorted(lengths, reverse=True)
    assert sum(lengths) == 10 - len(used)
    assert "Every id occurs." in Page(page(report)).text or used != list(range(10))


def tokenizer_of(*tokens):
    backend = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=tokens[0]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=tokens[0])


def test_scripts_share_all_rows_and_tokens_among_them():
    tokenizer = tokenizer_of("[UNK]", "the", "кот", "собака", "12", "猫")
    report = report_on_data({"train": lv.count_tokens([[1, 1, 2, 4, 0, 7]])}, full_size=8, tokenizer=tokenizer)
    uses = {use.script: (use.num_tokens, use.used_rows, use.unused_rows) for use in report.scripts}
    assert uses == {
        "Latin": (2, 1, 0), "Cyrillic": (1, 1, 1), "Common": (1, 1, 0), "added tokens": (1, 1, 0), "Han": (0, 0, 1),
        "no token": (1, 1, 1),
    }  # fmt: skip
    assert sum(use.used_rows + use.unused_rows for use in report.scripts) == 8


def test_without_a_tokenizer_tokens_have_no_names_and_the_page_says_why():
    report = report_on_data(counted(), full_size=FULL_SIZE)
    assert report.scripts == ()
    assert {use.token for use in report.most_frequent} == {None}
    assert "counted without a tokenizer" in Page(page(report)).text


def test_ids_beyond_the_table_are_counted_apart():
    counts = {"train": lv.count_tokens([[1, 1, 2, 12, 13]])}
    report = report_on_data(counts, full_size=5)
    assert (report.num_tokens, report.outside_tokens, report.used_rows) == (3, 2, 2)
    assert "tokens beyond the table" in Page(page(report)).text


# --- the page ---------------------------------------------------------------------------------------------------------


def numbers(plain):
    """All numbers in plain values."""
    if isinstance(plain, dict):
        return [number for value in plain.values() for number in numbers(value)]
    if isinstance(plain, list | tuple):
        return [number for value in plain for number in numbers(value)]
    return [plain] if isinstance(plain, int | float) and not isinstance(plain, bool) else []


def test_every_number_is_on_the_page_in_full():
    report = whole_report()
    plain = json.loads(json.dumps(report.to_dict()))
    shown = Counter(Page(page(report)).values)
    memory = plain.pop("memory")
    for footprint in ("full", "partial"):
        parts = [value for name, value in memory[footprint].items() if name.endswith("_bytes") and value]
        assert not Counter(map(float, parts)) - shown, parts
    missing = Counter(map(float, numbers(plain))) - shown
    missing = Counter({number: times for number, times in missing.items() if number and number not in shown})
    assert not missing
    assert set(map(float, plain["rows_to_cover"])) <= set(shown)


def test_the_page_asks_for_nothing():
    text = page(whole_report())
    tags = Page(text).tags
    assert {"script", "link", "img", "iframe", "object", "image", "use", "a"}.isdisjoint(tag for tag, _ in tags)
    assert not [a for _, attributes in tags for a in attributes if a in ("src", "href", "srcset") or a.startswith("on")]
    assert "url(" not in text
    assert "@import" not in text
    assert "//" not in text.replace("</", "")
    policy = next(a["content"] for tag, a in tags if tag == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_same_report_gives_the_same_page():
    assert page(whole_report()) == page(whole_report())


HOSTILE = [
    "<script>alert(1)</script>", "</style><b>", '"><img src=x onerror=alert(1)>', "&amp;", "a\u202eb", "\x00\x07\x1b[31m",
    "\ud800", "שלום", "e\u200bf", " the ", "\u0301", "\u2028", "'",
]  # fmt: skip


class Hostile:
    """A tokenizer whose tokens are not to be trusted."""

    def convert_ids_to_tokens(self, token_id):
        return HOSTILE[token_id] if token_id < len(HOSTILE) else None


def test_what_comes_from_data_is_text_and_is_seen():
    tokens = lv.TokenCounts(np.arange(len(HOSTILE), 0, -1))
    counts = {"train": tokens, "<script>split": tokens}
    report = report_on_data(
        counts, full_size=20, tokenizer=Hostile(), title="<script>\u202e.csv", notes=("a <b>note</b>",), run=run_of()
    )
    run = replace(report.run, validations=((1, {"<script>f1": 0.5}),), scores={"<i>": 1.0})
    report = replace(report, run=run, memory=replace(estimate(), model="<script>model"))
    text = page(report)
    text.encode()  # no halves of characters
    parsed = Page(text)
    assert {tag for tag, _ in parsed.tags} <= {tag for tag, _ in Page(page(whole_report())).tags}
    shown = "".join(parsed.texts)
    for seen in (
        "<script>alert(1)</script>", "</style><b>", '"><img␣src=x␣onerror=alert(1)>', "&amp;", r"a\u202eb", r"\x00\x07\x1b[31m",
        r"\ud800", "שלום", r"e\u200bf", "␣the␣", "◌\u0301", r"\u2028", r"<script>\u202e.csv", "<script>split",
        "a <b>note</b>", "<script>f1", "<script>model",
    ):  # fmt: skip
        assert seen in shown
    assert not re.search("[\u202e\u200b\u2028\x00\x07\x1b]", text)


@pytest.mark.parametrize(
    "report",
    [
        report_on_data({"train": lv.TokenCounts(np.zeros(4, np.int64))}, full_size=4),
        report_on_data({"train": lv.count_tokens([[0]])}, full_size=1),
        report_on_data(
            {"train": lv.count_tokens([[0]])},
            full_size=1,
            run=RunReport(num_steps=0, losses=(), validations=(), scores={}, seconds={}, peak_bytes={}),
        ),
        report_on_data(
            {"train": lv.count_tokens([[0]])},
            full_size=1,
            run=RunReport(
                num_steps=1,
                losses=((1, 0.0),),
                validations=((1, {"loss": float("nan")}),),
                scores={},
                seconds={},
                peak_bytes={},
            ),
        ),
    ],
    ids=["nothing counted", "one row", "a run of no steps", "losses of nothing"],
)
def test_little_makes_a_page_too(report):
    assert "nan" not in "".join(
        value for _, attributes in Page(page(report)).tags for value in attributes.values() if value
    )


def test_a_large_vocabulary_makes_a_small_page():
    counts = np.random.default_rng(0).zipf(1.1, 250_002) % 100_000
    report = report_on_data({"train": lv.TokenCounts(counts), "test": lv.TokenCounts(counts)}, full_size=250_002)
    assert len(report.curve) <= 500
    assert len(page(report).encode()) < 500_000


def test_a_page_is_written_whole_where_its_name_allows(tmp_path):
    report = whole_report()
    assert write_report(report, tmp_path / "report.html") == tmp_path / "report.html"
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page(report)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(SettingsError, match=r"expected a name that ends in \.html, got 'model\.safetensors'"):
        check_page(Path("model.safetensors"), True)
    with pytest.raises(CheckpointError, match=r"report\.html is there already; give --overwrite, or name another"):
        check_page(tmp_path / "report.html", False)
    with pytest.raises(CheckpointError, match="there is no folder"):
        check_page(tmp_path / "out" / "report.html", False)
    check_page(tmp_path / "report.html", True)
    check_page(tmp_path / "out" / "report.html", False, beside=tmp_path / "out")
    with pytest.raises(CheckpointError, match="is there already; set overwrite"):
        check_page(tmp_path / "report.html", False, beside=tmp_path)
