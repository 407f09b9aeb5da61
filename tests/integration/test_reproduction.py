"""The paper's tables and figure: cells are compared as they should be, and nothing partial passes for whole."""

import csv
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from texts import SPECIAL, WORDS, files_in, rows, save_pretrained, small_tokenizer, write
from transformers import BertConfig, BertForSequenceClassification, BertModel

from leanvocab.errors import DataError, ModelError
from leanvocab.vocabulary.counts import count_tokens
from reproduction import cells, evidence, grid, heaps, inventory, reductions, report, training, unused
from reproduction.bench import Bench
from reproduction.counting import count_text
from reproduction.paper import MODELS, PUBLISHED, Model, Paper, find_task
from reproduction.sources import OWN_CONFIGS, Sources, check_tokenizer

NUM_ROWS = {"cola": {"train": 40, "validation": 24, "test": 8}, "wnli": {"train": 30, "validation": 12, "test": 6}}
TASKS = (find_task("cola"), find_task("wnli"))
NUM_PIECES = len(SPECIAL) + len(WORDS)
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TINY = Model("BERT", "someone/tiny", "someone/tiny")  # under a published name, so that it has a line in the tables
LIMITS = training.Limits(max_train_samples=16, max_eval_samples=16, epochs=1, cpu=True)


def tiny_config(**changes):
    return BertConfig(**{"vocab_size": NUM_PIECES, "max_position_embeddings": 128, **SIZES, **changes})


def texts(task, split):
    """Rows as the hub has them: other words in each split, so that each split counts."""
    made = rows(NUM_ROWS[task][split], seed=sum(map(ord, task + split)), pairs=task == "wnli")
    return [{("sentence" if name == "text" else name): value for name, value in row.items()} for row in made]


def naive_ids(task):
    """Token ids of all splits of a task, in the plainest way: one row after the other."""
    tokenizer, found = small_tokenizer(), []
    for split in NUM_ROWS[task.name]:
        for row in texts(task.name, split):
            found += tokenizer(*[row[column] for column in task.text_columns])["input_ids"]
    return found


def write_csv(path, lines):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    save_pretrained(folder / "tiny", BertModel(tiny_config()))
    return folder


@pytest.fixture
def data(tmp_path):
    for task, splits in NUM_ROWS.items():
        for split in splits:
            write(tmp_path / "data" / "glue" / f"{task}.{split}.parquet", texts(task, split))
    return tmp_path / "data"


@pytest.fixture
def published(tmp_path):
    """Published tables as someone would have measured them on the small data, in the plainest way."""
    folder = tmp_path / "published"
    folder.mkdir()
    model = BertForSequenceClassification(tiny_config())
    table, whole = NUM_PIECES * SIZES["hidden_size"], sum(parameter.numel() for parameter in model.parameters())
    unused_ratio = {task.name: 1 - len(set(naive_ids(task))) / NUM_PIECES for task in TASKS}
    for name, factor in (("embedding", 1.0), ("model", table / whole)):
        line = {task: f"{100 * ratio * factor:.1f}" for task, ratio in unused_ratio.items()}
        write_csv(folder / f"table2_{name}_reduction_percent.csv", [{"model": "BERT", **line}])
    own = {task.label: {**NUM_ROWS[task.name], "total": sum(NUM_ROWS[task.name].values())} for task in TASKS}
    examples = [line | own.get(line["task"], {}) for line in Paper().rows("table7_glue_examples")]
    write_csv(folder / "table7_glue_examples.csv", examples)
    for name in ("table1_unused_tokens", "table9_runtime_seconds", "table10_glue_scores"):
        (folder / f"{name}.csv").write_text((PUBLISHED / f"{name}.csv").read_text())
    return folder


@pytest.fixture
def sources(data, pretrained, published):
    return Sources(data, pretrained, pretrained, Paper(published))


@pytest.fixture
def bench(sources):
    return Bench.of(sources, progress=False)


def table2(bench):
    return reductions.table2(bench, TASKS, [TINY])


def make_partial(data, task="wnli", split="train"):
    """The split is whole, but its name says that it is not: the name is believed."""
    path = data / "glue" / f"{task}.{split}.parquet"
    path.rename(path.with_name(f"{task}.{split}_partial.parquet"))


# ------------------------------------------------------------------------------------------------------- cells


@pytest.mark.parametrize(
    ("measured", "status", "text", "look"),
    [
        (80.0537, "matched", "80.1", "same"),
        (80.0439, "matched", "80.0 ≈ 80.1", "near"),
        (80.2, "matched", "80.2 ≈ 80.1", "near"),
        (80.21, "differs", "80.2 ≠ 80.1", "differs"),
        (77.6762, "differs", "77.7 ≠ 80.1", "differs"),
        (None, "undecided", "– (80.1)", "undecided"),
    ],
)
def test_a_cell_is_matched_within_a_tenth_and_shows_what_differs(measured, status, text, look):
    cell = cells.make_cell("table2", "BERT", "cola", 80.1, measured, tolerance=0.1)
    assert cell.status == status
    assert grid.entry(cell, cell.measured) == grid.Entry(text, look)


def test_without_a_tolerance_every_digit_counts():
    assert cells.compare(98.4, 98.3808, 0) == "matched"
    assert cells.compare(98.4, 98.3499, 0) == "differs"
    assert cells.compare(128100, 128100.0, 0, decimals=0) == "matched"


def test_what_differs_stands_out_in_markdown_and_on_a_terminal():
    from rich.console import Console

    made = [cells.make_cell("t", "BERT", "cola", 80.1, 77.7, tolerance=0.1)]
    shown = grid.cell_grid("title", "Model", made, {"cola": "CoLA"})
    assert "| BERT | **77.7 ≠ 80.1** |" in grid.to_markdown(shown)
    console = Console(width=60, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(grid.to_rich(shown))
    assert "\x1b[1;37;41m77.7 ≠ 80.1" in capture.get()


def test_numbers_are_never_cut_on_a_narrow_terminal():
    from rich.console import Console

    made = [cells.make_cell("t", "BERT", f"c{number}", 14.8, None, at_most=28.3) for number in range(10)]
    console = Console(width=60, color_system=None)
    with console.capture() as capture:
        console.print(grid.to_rich(grid.cell_grid("title", "Model", made, {})))
    assert "…" not in capture.get()


def test_variants_are_shown_but_not_counted():
    made = [
        cells.make_cell("t", "BERT", "cola", 80.1, 80.1, tolerance=0.1),
        cells.make_cell("t", "BERT", "cola", 80.1, 77.7, tolerance=0.1, variant="bert-base-cased"),
        cells.make_cell("t", "BERT", "rte", 41.5, None, reason="rte is not at hand"),
    ]
    assert cells.tally(made) == {"cells": 2, "matched": 1, "same_digits": 1, "differs": 0, "undecided": 1}
    assert cells.undecided_reasons(made) == {"rte is not at hand": 1}
    labels = [label for label, _ in grid.cell_grid("title", "Model", made, {}).rows]
    assert labels == ["BERT", "BERT (bert-base-cased)"]


# ----------------------------------------------------------------------------------------------- Tables 2, 3 and 7


def test_a_reduction_is_that_of_the_tokens_that_occur_in_all_splits(bench):
    made = table2(bench).cells
    measured = {cell.column: cell.measured for cell in made if "embedding" in cell.table}
    for task in TASKS:
        assert measured[task.name] == pytest.approx(100 * (1 - len(set(naive_ids(task))) / NUM_PIECES), abs=1e-12)
    assert cells.tally(made) == {"cells": 4, "matched": 4, "same_digits": 4, "differs": 0, "undecided": 0}


def test_the_second_column_keeps_every_special_token(bench):
    for cell in table2(bench).cells:
        if "embedding" in cell.table:
            used = set(naive_ids(find_task(cell.column)))
            kept = used | set(range(len(SPECIAL)))
            assert used < kept
            assert cell.with_special == pytest.approx(100 * (1 - len(kept) / NUM_PIECES), abs=1e-12)


def test_a_wrong_published_number_differs(bench, published):
    path = published / "table2_embedding_reduction_percent.csv"
    write_csv(path, [{"model": "BERT", "cola": "12.3", "wnli": "45.6"}])
    made = table2(bench).cells
    assert [cell.status for cell in made] == ["differs", "differs", "matched", "matched"]


def test_pairs_are_cut_together_at_128_tokens(data, bench):
    task, words = find_task("wnli"), " ".join(WORDS[:90])
    long = [{"sentence1": words, "sentence2": " ".join(WORDS[100:200]), "label": 0}]
    write(data / "glue" / "wnli.train.parquet", long)
    tokenizer = bench.sources.tokenizer(TINY.tokenizer)
    found = count_text(bench.sources.glue(task), tokenizer)
    expected = tokenizer(words, long[0]["sentence2"], truncation=True, max_length=128)["input_ids"]
    others = [row for split in ("validation", "test") for row in texts("wnli", split)]
    for row in others:
        expected += tokenizer(row["sentence1"], row["sentence2"])["input_ids"]
    assert found == count_tokens([expected])


def test_a_partial_split_decides_nothing_and_is_named(data, bench):
    make_partial(data)
    made = {(cell.table.split("_")[1], cell.column): cell for cell in table2(bench).cells}
    cell = made["embedding", "wnli"]
    assert (cell.status, cell.measured) == ("undecided", None)
    assert cell.reason == "wnli.train is partial: 30 of 30 rows"
    assert cell.at_most == pytest.approx(cell.published, abs=0.05)
    assert grid.entry(cell, cell.measured).text == f"≤ {cell.at_most:.1f} ({cell.published})"
    assert made["embedding", "cola"].status == "matched"


def test_a_partial_split_is_never_counted_as_examples(data, bench):
    make_partial(data)
    made = {(cell.row, cell.column): cell for cell in inventory.table7(bench, TASKS).cells}
    assert made["WNLI", "train"].status == made["WNLI", "total"].status == "undecided"
    assert made["WNLI", "train"].reason == "train is partial (30 rows)"
    assert made["WNLI", "validation"].status == made["CoLA", "total"].status == "matched"


def test_a_split_with_other_rows_than_the_paper_s_decides_nothing(data, bench):
    write(data / "glue" / "cola.train.parquet", texts("cola", "train")[:-1])
    cell = table2(bench).cells[0]
    assert (cell.status, cell.reason) == ("undecided", "cola.train has 39 rows, the paper's 40")
    assert inventory.table7(bench, TASKS).cells[0].status == "differs"


def test_a_missing_split_and_a_missing_task_are_named(data, bench):
    (data / "glue" / "cola.test.parquet").unlink()
    for path in (data / "glue").glob("wnli.*"):
        path.unlink()
    reasons = {cell.column: cell.reason for cell in table2(bench).cells}
    assert reasons == {"cola": "cola.test is not at hand", "wnli": "wnli is not at hand"}


def test_a_model_without_its_tokenizer_is_undecided(bench):
    absent = Model("BERT", "facebook/xlm-v-base", "facebook/xlm-v-base")
    made = reductions.table2(bench, TASKS, [absent]).cells
    assert {cell.status for cell in made} == {"undecided"}
    assert {cell.reason for cell in made} == {"the tokenizer xlm-v-base is not in the folder of tokenizers"}


def test_results_are_the_same_when_a_data_set_is_counted_twice(bench):
    assert table2(bench).cells == table2(bench).cells


# ------------------------------------------------------------------------------------------------------- errors


def test_what_is_wrong_is_named(data, pretrained, published, sources):
    with pytest.raises(DataError, match="unknown task 'colla'; GLUE has cola, mnli, mrpc"):
        find_task("colla")
    with pytest.raises(DataError, match=r"the folder .*nowhere \(--data\) does not exist"):
        Sources(data / "nowhere")
    with pytest.raises(DataError, match=r"there is no folder .*xnli; expected Parquet files such as xnli.de.train"):
        sources.xnli("de")
    for path in (data / "glue").glob("wnli.*"):
        path.unlink()
    with pytest.raises(DataError, match=r"holds no file of the task 'wnli'; expected glue/wnli.train.parquet"):
        sources.require(find_task("wnli"))
    with pytest.raises(DataError, match=r"the published table .*table4.csv does not exist"):
        Paper(published).rows("table4")


def test_a_file_that_cannot_be_read_is_named(data, sources):
    (data / "glue" / "cola.train.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"cola.train.parquet cannot be read as .parquet"):
        sources.glue(find_task("cola"))


def test_a_tokenizer_that_cannot_be_read_is_named(data, published, tmp_path):
    (tmp_path / "broken" / "tiny").mkdir(parents=True)
    with pytest.raises(ModelError, match="the tokenizer 'someone/tiny' cannot be loaded"):
        Sources(data, tmp_path / "broken", None, Paper(published)).tokenizer("someone/tiny")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"vocab_size": NUM_PIECES - 1}, f"it has {NUM_PIECES} pieces, the config {NUM_PIECES - 1} rows"),
        ({"vocab_size": NUM_PIECES + 10}, f"it has {NUM_PIECES} pieces, the config {NUM_PIECES + 10} rows"),
        ({"pad_token_id": 1}, "its pad_token_id is 0, the config's 1"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(changes, problem):
    message = f"the tokenizer 'a/b' does not match the config of 'c/d': {problem}"
    with pytest.raises(ModelError, match=message):
        check_tokenizer("a/b", small_tokenizer(), "c/d", tiny_config(**changes))


def test_rows_that_fill_up_a_matrix_are_no_mismatch():
    check_tokenizer("a/b", small_tokenizer(), "c/d", tiny_config(vocab_size=NUM_PIECES + 3))


def test_training_on_a_partial_task_is_refused(data, sources):
    make_partial(data)
    assert [task.name for task in training.trainable_tasks(sources, None)] == ["cola"]
    with pytest.raises(DataError, match=r"'wnli' is not complete, so it is not trained on: wnli.train is partial"):
        training.trainable_tasks(sources, [find_task("wnli")])


def test_without_a_folder_data_come_from_the_hub_by_their_names(monkeypatch, published):
    asked = []

    def load(name, config_name):
        asked.append((name, config_name))
        return {split: read_rows(config_name, split) for split in NUM_ROWS["cola"]}

    def read_rows(config_name, split):
        import datasets

        return datasets.Dataset.from_list(texts("cola", split))

    monkeypatch.setattr("leanvocab.texts.data_files.load_splits", load)
    sources = Sources(paper=Paper(published))
    assert sources.glue(find_task("cola")).is_complete
    assert sources.xnli("de").gaps[0] == "xnli.de.train has 40 rows, the paper's 392,702"
    assert asked == [("nyu-mll/glue", "cola"), ("facebook/xnli", "de")]


# ---------------------------------------------------------------------------------------------- Tables 5 and 6


@pytest.mark.parametrize(
    ("table", "row", "checkpoint"),
    [
        ("table5_model_sizes", "DistilRoBERTa", "distilroberta-base"),
        ("table5_model_sizes", "DistilmBERT", "distilbert-base-multilingual-cased"),
        ("table5_model_sizes", "XLM-V", "xlm-v-base"),
        ("table6_deberta_v3_sizes", "XSmall", "deberta-v3-xsmall"),
        ("table6_deberta_v3_sizes", "Small", "deberta-v3-small"),
        ("table6_deberta_v3_sizes", "Large", "deberta-v3-large"),
    ],
)
def test_the_project_s_own_configs_have_the_published_sizes_in_every_digit(table, row, checkpoint):
    bench = Bench.of(Sources())
    assert (OWN_CONFIGS / f"{checkpoint}.json").is_file()
    made = inventory._size_cells(bench, table, row, f"someone/{checkpoint}", Paper().numbers(table)[row])
    assert len(made) >= 4
    assert all(cell.status == "matched" for cell in made)


# ------------------------------------------------------------------------------------------------------ Figure 2


def test_heaps_law_is_found_in_numbers_made_by_it():
    totals = np.geomspace(1e4, 1e7, 8)
    fit = heaps.fit_heaps(totals, 12.5 * totals**0.61)
    assert (fit.k, fit.beta) == (pytest.approx(12.5), pytest.approx(0.61))
    assert fit.r_squared == pytest.approx(1.0)
    assert fit.beta_error == pytest.approx(0.0, abs=1e-9)


def test_heaps_law_agrees_with_a_plain_line_through_the_logarithms():
    totals, uniques = [31839, 100278, 290203, 894791], [1989, 6991, 18078, 15778]
    slope, intercept = np.polyfit(np.log(totals), np.log(uniques), 1)
    fit = heaps.fit_heaps(totals, uniques)
    assert (fit.beta, np.log(fit.k)) == (pytest.approx(slope), pytest.approx(intercept))


def test_two_data_sets_are_no_curve(sources, tmp_path):
    with pytest.raises(DataError, match="a Heaps curve needs 3 complete data sets or more, got 2"):
        heaps.fit_heaps([10, 100], [5, 20])


def test_a_figure_is_drawn_as_png_and_svg_and_is_the_same_twice(tmp_path):
    grown = [
        heaps.Growth("WNLI", True, (100, 1000), (50, 300)),
        heaps.Growth("CoLA", True, (5000,), (900,)),
        heaps.Growth("QQP", False, (90000,), (3000,)),
    ]
    fit = heaps.fit_heaps([1000, 5000, 20000], [300, 900, 2000])
    for folder in ("one", "two"):
        for suffix in ("png", "svg"):
            heaps._draw(grown, fit, 50257, tmp_path / folder / f"figure2.{suffix}")
    assert files_in(tmp_path / "one") == ["figure2.png", "figure2.svg"]
    for name in files_in(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# ------------------------------------------------------------------------------------------------------- Table 1


def test_the_tokens_that_never_occur_are_listed_with_their_ids(tmp_path, sources):
    (tmp_path / "text" / "inner").mkdir(parents=True)
    (tmp_path / "text" / "a.txt").write_text("word1 word2\nword3\n")
    (tmp_path / "text" / "inner" / "b").write_text("word2 word299")
    (tmp_path / "text" / "picture.bin").write_bytes(b"word7\0word8")
    corpus = unused.folder_corpus(tmp_path / "text")
    tokenizer = small_tokenizer()
    found = unused.unused_tokens(unused.count_corpus(corpus, tokenizer, progress=False), tokenizer)
    expected = set(tokenizer.get_vocab()) - {"word1", "word2", "word3", "word299"}
    assert {each["token"] for each in found} == expected
    assert [each["token_id"] for each in found] == sorted(tokenizer.convert_tokens_to_ids(list(expected)))
    assert [each["token"] for each in found if each["special"]] == SPECIAL
    assert (corpus.num_bytes, corpus.skipped) == (18 + 13, ["picture.bin"])


def test_a_stream_is_read_as_it_comes_and_never_held():
    read = 0

    def lines():
        nonlocal read
        for number in range(100_000):
            read += 1
            yield f"word{number % 300} word5\n"

    blocks = unused.stream_corpus(lines()).blocks()
    next(blocks)
    assert read < 3_000
    assert sum(1 for _ in blocks) > 50


def test_a_stream_of_one_endless_line_is_cut(monkeypatch):
    monkeypatch.setattr(unused, "_LONGEST_BLOCK", 1 << 15)
    blocks = list(unused.stream_corpus(["x" * 100_000]).blocks())
    assert "".join(blocks) == "x" * 100_000
    assert max(map(len, blocks)) <= 1 << 15


def test_blocks_are_cut_only_where_no_token_can_lie(monkeypatch):
    monkeypatch.setattr(unused, "_BLOCK_CHARACTERS", 20)
    text = "def one():\n    return 1\n\n\ndef two():\n    return 2\n" * 20
    blocks = list(unused.Corpus("text", [text]).blocks())
    assert "".join(blocks) == text
    assert len(blocks) > 10
    assert all(block.endswith("\n") and not block[0].isspace() for block in blocks)


def test_a_corpus_stops_after_so_many_bytes():
    corpus = unused.stream_corpus("word1\n" for _ in range(100_000))
    assert sum(map(len, corpus.blocks(50_000))) == corpus.num_bytes < 70_000


def test_a_folder_that_is_not_there_and_two_corpora_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"the folder of text .*absent does not exist"):
        unused.folder_corpus(tmp_path / "absent")
    with pytest.raises(DataError, match="name one corpus"):
        unused.open_corpus("-", True, None, None, "train", "text")


# ------------------------------------------------------------------------------------------------ Tables 9 and 10


def test_scores_losses_and_weights_are_equal_for_every_seed(sources):
    made = training.table10(sources, ["tiny"], TASKS, seeds=2, limits=LIMITS, progress=False)
    found = made.records["table10_seeds"]
    assert [(each["task"], each["seed"]) for each in found] == [("cola", 0), ("cola", 1), ("wnli", 0), ("wnli", 1)]
    assert all(each["equal"] and each["score_off"] == each["score_on"] for each in found)
    assert all(each["num_steps"] == 1 and 0 < each["kept_rows"] < NUM_PIECES for each in found)
    assert "equal bit for bit in 4 of 4" in made.notes[0]
    assert {cell.status for cell in made.cells} == {"undecided"}


def test_scores_that_are_not_equal_are_shown_as_such():
    equal = training.Pair("tiny", "cola", 0, "matthews", 50.0, 50.0, True, True, True, 1, 10, 20, 1.0, 1.0)
    other = dataclasses.replace(equal, score_on=50.0000001, same_scores=False, same_weights=False)
    assert training._seed_grid([equal]).rows[0][1][3].text == "equal"
    entry = training._seed_grid([other]).rows[0][1][3]
    assert entry == grid.Entry("NOT EQUAL: scores, weights", "differs")


def test_times_are_those_of_five_runs_with_mean_and_deviation(sources):
    limits = training.Limits(max_steps=1, cpu=True)
    made = training.table9(sources, "tiny", [find_task("wnli")], runs=2, limits=limits, progress=False)
    found = made.records["table9_runs"]
    assert [each["run"] for each in found] == [0, 1]
    assert all(each["num_steps"] == 1 and each["whole_steps"] == 3 for each in found)
    for each in found:
        assert each["pema_seconds"] == each["counting_seconds"] + each["shrinking_seconds"]
        assert each["finetuning_seconds"] == 3 * each["training_seconds"]
    assert training._mean_and_deviation([1.0, 2.0, 3.0, 4.0, 5.0], 2) == "3.00 ± 1.58"
    assert {cell.status for cell in made.cells} == {"undecided"}


def test_a_cell_of_table_10_is_decided_by_whole_runs_alone(sources):
    pair = training.Pair(
        "roberta-base", "cola", 0, "matthews", 57.55, 57.61, False, False, False, 804, 10, 20, 1.0, 1.0
    )
    pairs = [dataclasses.replace(pair, seed=seed) for seed in range(5)]
    for limits, seeds, status in (
        (training.Limits(), 5, "matched"), (training.Limits(), 4, "undecided"), (LIMITS, 5, "undecided"),
    ):  # fmt: skip
        made = training._score_cells(sources, pairs, seeds, limits)
        assert [cell.status for cell in made if (cell.row, cell.column) == ("RoBERTa on", "cola")] == [status]


# ------------------------------------------------------------------------------------------- report and commands


def test_the_report_counts_cells_and_gives_reasons(data, bench, tmp_path):
    make_partial(data)
    made = [table2(bench), inventory.table7(bench, TASKS)]
    report.write_report(made, tmp_path / "REPORT.md", seconds=60)
    text = (tmp_path / "REPORT.md").read_text()
    assert "| Table 2 | 4 | 2 | 2 | 0 | 2 |" in text
    assert "| All | 12 | 8 | 8 | 0 | 4 |" in text
    assert "| Table 2 | 2 | wnli.train is partial: 30 of 30 rows |" in text
    assert "| torch |" in text
    assert str(data) not in text


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "reproduction", *map(str, arguments)], capture_output=True, text=True, **options
    )


def test_a_command_writes_its_csv_and_prints_json(data, pretrained, tmp_path, repository):
    options = ("--data", data, "--tokenizers", pretrained, "--output", tmp_path / "out")
    for _ in range(2):
        done = command("table7", "--task", "cola", *options, "--json", cwd=repository)
        assert done.returncode == 0, done.stderr
        assert files_in(tmp_path / "out") == ["table7_glue_examples.csv"]
    printed = json.loads(done.stdout)
    assert printed["tally"]["differs"] == 4  # the small data are not the paper's
    with (tmp_path / "out" / "table7_glue_examples.csv").open(newline="") as file:
        line = next(csv.DictReader(file))
    assert (line["published"], line["measured"], line["status"]) == ("8551", "40", "differs")


def test_an_error_of_a_command_is_one_message(data, repository, tmp_path):
    done = command("table2", "--data", data, "--task", "rte", "--json", "-o", tmp_path / "out", cwd=repository)
    assert done.returncode == 1
    assert "holds no file of the task 'rte'" in json.loads(done.stdout)["error"]["message"]
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------- real data


@pytest.fixture
def real(shared):
    folder = shared / "data"
    return Bench.of(Sources(folder, folder / "tokenizers"), progress=False)


@pytest.mark.shared_data
def test_the_published_tables_are_copied_exactly(shared):
    for path in (shared / "paper" / "tables").glob("*.csv"):
        assert (PUBLISHED / path.name).read_bytes() == path.read_bytes()


@pytest.mark.shared_data
def test_the_small_tasks_give_table_2_in_every_digit(real):
    tasks = (find_task("cola"), find_task("wnli"))
    made = reductions.table2(real, tasks).cells
    assert cells.tally(made) == {"cells": 36, "matched": 32, "same_digits": 32, "differs": 0, "undecided": 4}
    cased = {cell.column: cell.format(cell.measured) for cell in made if cell.variant and "embedding" in cell.table}
    assert cased == {"cola": "77.7", "wnli": "93.7"}


@pytest.mark.shared_data
def test_tables_5_6_and_8_have_the_published_digits(real):
    for made, number in ((inventory.table5(real), 36), (inventory.table6(real), 24), (inventory.table8(real), 9)):
        found = cells.tally(made.cells)
        assert (found["cells"], found["same_digits"]) == (number, number)


@pytest.mark.shared_data
def test_xnli_without_training_sets_decides_no_cell(real):
    made = reductions.table4(real, [model for model in MODELS if model.name == "XLM-V"])
    assert {cell.status for cell in made.cells} == {"undecided"}
    text = grid.to_markdown(made.grids[-1])
    assert "| de | – | 2,490 | 5,010 |" in text
    assert "| fr | – | – | – |" in text


@pytest.mark.shared_data
def test_table_2_fits_the_uncased_vocabulary_and_table_1_roberta_s_ids(real):
    checks = {check.what.rpartition(" ")[2]: check for check in evidence._table2_shares(real) if "BERT:" in check.what}
    assert (checks["bert-base-uncased"].fitting, checks["bert-base-cased"].fitting) == (10, 0)
    made = unused._id_cells(real.sources)
    assert [cell.status for cell in made] == ["matched"] * 5 + ["differs"] * 5
    assert {cell.variant for cell in made[5:]} == {"gpt2"}
