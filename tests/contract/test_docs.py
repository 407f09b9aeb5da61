"""What the README and the guides say is true: their snippets run, their commands, files and names exist."""

import ast
import csv
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import leanvocab as lv
from docs.figures import draw_encoders, draw_trimming, draw_wings
from leanvocab.partial.optimizers import is_row_separable

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, language, mark=None):
    """(first line, code) of each fenced block of a language; `mark` is the word after the language."""
    text = page.read_text()
    for found in BLOCK.finditer(text):
        if found[1] == language and found[2] == mark:
            yield text.count("\n", 0, found.start()) + 2, found[3]


def page_name(page):
    return str(page.relative_to(REPOSITORY))


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    """What a reader has before the first line: a model, its tokenizer, a tokenized data set, arguments, a batch."""
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", *(f"word{number}" for number in range(60))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        pad_token_id=0,
    )
    texts = ["word1 word3 word5", "word40 word3", "word1 word59 word5 word7", "word2"]
    dataset = datasets.Dataset.from_dict({"text": texts, "labels": [0, 1, 0, 1]})
    dataset = dataset.map(lambda rows: tokenizer(rows["text"], padding=True), batched=True, remove_columns="text")
    batch = {name: torch.tensor(dataset[name]) for name in ("input_ids", "attention_mask", "labels")}
    counts = lv.count_tokens(dataset)
    model = transformers.BertForSequenceClassification(config)
    return {
        "lv": lv,
        "torch": torch,
        "warnings": importlib.import_module("warnings"),
        "model": model,
        "tokenizer": tokenizer,
        "dataset": dataset,
        "more_data": dataset,
        "batch": batch,
        "counts": counts,
        "vocabulary": lv.PartialVocabulary.from_counts(counts, tokenizer=tokenizer, model=model),
        "args": transformers.TrainingArguments("checkpoints", max_steps=2, report_to="none", use_cpu=True),
    }


@pytest.mark.parametrize("page", [page for page in PAGES if list(blocks(page, "python"))], ids=page_name)
def test_every_snippet_runs(page, namespace):
    for line, code in blocks(page, "python"):
        padded = "\n" * (line - 1) + code  # a failure names the page's own line
        exec(compile(padded, str(page), "exec"), namespace)


def test_snippets_that_need_a_hub_are_python_and_their_names_exist():
    for code in [code for page in PAGES for _, code in blocks(page, "python", "hub")]:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lv":
                assert hasattr(lv, node.attr), ast.unparse(node)


def test_every_python_block_is_run_or_marked_as_needing_a_hub():
    found = [found for page in PAGES for found in BLOCK.finditer(page.read_text()) if found[1] == "python"]
    assert {block[2] for block in found} == {None, "hub"}
    fences = sum(page.read_text().count("```python") for page in PAGES)
    assert fences == len(found)


def test_the_table_of_multilingual_encoders_is_what_the_estimate_says_today():
    page = draw_encoders.PAGE.read_text()
    assert page.partition(draw_encoders.BEGIN)[2].partition(draw_encoders.END)[0] == draw_encoders.drawn()


def test_the_tables_of_trimming_are_what_the_result_files_say():
    page = draw_trimming.PAGE.read_text()
    assert page.partition(draw_trimming.BEGIN)[2].partition(draw_trimming.END)[0] == draw_trimming.drawn()


def commands():
    for page in PAGES:
        for _, code in blocks(page, "bash"):
            for line in code.splitlines():
                yield line.partition(" #")[0].split()


def test_every_leanvocab_command_has_the_options_that_the_pages_give_it():
    helps = {}
    seen = [words for words in commands() if words and words[0] == "leanvocab"]
    assert {words[1] for words in seen} == {"count", "delta", "estimate", "finetune", "info", "merge", "trim"}
    for words in seen:
        if words[1] not in helps:
            run = [shutil.which("leanvocab", path=str(Path(sys.executable).parent)), words[1], "--help"]
            helps[words[1]] = subprocess.run(run, capture_output=True, text=True, check=True).stdout
        for option in (word for word in words if word.startswith("--")):
            assert option in helps[words[1]], " ".join(words)


def test_every_make_target_that_the_pages_name_exists():
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    named = {words[1] for words in commands() if words and words[0] == "make"}
    named |= {target for page in PAGES for target in re.findall(r"`make ([a-z-]+)`", page.read_text())}
    assert {"demo", "test"} <= named <= targets


def test_every_link_within_the_repository_leads_somewhere():
    for page in PAGES:
        prose = BLOCK.sub("", page.read_text())
        for target in re.findall(r"\]\(([^)#]+)", prose):
            assert "://" in target or (page.parent / target).exists(), f"{page_name(page)}: {target}"


def test_the_wings_are_drawn_and_the_rooms_listed_as_they_are_today():
    text = draw_wings.PAGE.read_text()
    assert draw_wings.BEGIN + draw_wings.drawn() + draw_wings.END in text, "run `make figures`"


def test_a_circle_of_wings_is_not_drawn():
    with pytest.raises(ValueError, match=r"these wings import one another in a circle: \['a', 'b'\]"):
        draw_wings.floors({"a": {"b"}, "b": {"a"}, "c": set()})


# The rows of the table in docs/exactness.md, as optimizers.
OPTIMIZERS = {
    "SGD, with and without momentum": [(torch.optim.SGD, {}), (torch.optim.SGD, {"momentum": 0.9})],
    "Adam": [(torch.optim.Adam, {})],
    "AdamW without weight decay": [(torch.optim.AdamW, {"weight_decay": 0.0})],
    "AdamW with weight decay": [(torch.optim.AdamW, {"weight_decay": 0.1})],
    "Adagrad": [(torch.optim.Adagrad, {})],
    "RMSprop": [(torch.optim.RMSprop, {})],
    "Adafactor (torch, transformers)": [
        (torch.optim.Adafactor, {}),
        (transformers.Adafactor, {"scale_parameter": False, "relative_step": False}),
    ],
    "Muon": [(torch.optim.Muon, {"weight_decay": 0.0})],
}


def train(make, options, rows, start, gradients):
    parameter = torch.nn.Parameter(start[rows].clone())
    optimizer = make([parameter], lr=1e-3, **options)
    for gradient in gradients:
        parameter.grad = gradient[rows].clone()
        optimizer.step()
    return parameter.detach()


def test_the_table_of_optimizers_is_measured():
    """Five steps on all rows, with zero gradients on unused ones, against the used rows alone."""
    page = (REPOSITORY / "docs" / "exactness.md").read_text()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    table = {row[0]: row[1:] for row in table[1:] if row[0] != "---"}
    assert set(table) == set(OPTIMIZERS)
    generator = torch.Generator().manual_seed(0)
    start, used = torch.randn(40, 8, generator=generator), torch.tensor([3, 11, 17, 30])
    gradients = [torch.zeros(40, 8).index_copy(0, used, torch.randn(4, 8, generator=generator)) for _ in range(5)]
    unused = torch.tensor([row for row in range(40) if row not in used.tolist()])
    for name, variants in OPTIMIZERS.items():
        separable, of_used, of_unused = table[name]
        for make, options in variants:
            full = train(make, options, torch.arange(40), start, gradients)
            partial = train(make, options, used, start, gradients)
            assert torch.equal(full[used], partial) == (of_used == "identical"), name
            assert torch.equal(full[unused], start[unused]) == (of_unused == "unchanged"), name
            example = make([torch.nn.Parameter(start.clone())], lr=1e-3, **options)
            assert is_row_separable(example) == (separable == "yes"), name


def tiny_bert():
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=500, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
    )


def weight_files(folder):
    return sorted(path.name for path in folder.iterdir() if "safetensors" in path.name)


def test_saving_shards_over_one_file_leaves_a_stale_file_that_wins_as_the_page_says(tmp_path):
    first, second = tiny_bert(), tiny_bert()
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path, max_shard_size="40KB")
    assert "model.safetensors" in weight_files(tmp_path)
    loaded = transformers.BertModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_input_embeddings().weight, first.get_input_embeddings().weight)
    assert not torch.equal(loaded.get_input_embeddings().weight, second.get_input_embeddings().weight)


def test_saving_one_file_over_shards_deletes_them_before_it_writes_as_the_page_says(tmp_path, monkeypatch):
    tiny_bert().save_pretrained(tmp_path, max_shard_size="40KB")

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        tiny_bert().save_pretrained(tmp_path)
    assert weight_files(tmp_path) == ["model.safetensors.index.json"]


@pytest.mark.parametrize("shards", ["one file to shards", "shards to one file"])
def test_save_full_is_safe_in_both_cases_as_the_page_says(tmp_path, shards):
    first, second = tiny_bert(), tiny_bert()
    sizes = ("5GB", "40KB") if shards == "one file to shards" else ("40KB", "5GB")
    first.save_pretrained(tmp_path / "model", max_shard_size=sizes[0])
    lv.save_full(second, tmp_path / "model", max_shard_size=sizes[1])
    loaded = transformers.BertModel.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.get_input_embeddings().weight, second.get_input_embeddings().weight)
    assert ("model.safetensors" in weight_files(tmp_path / "model")) == (shards == "shards to one file")


def load_figure_script(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "docs" / "figures")
    return importlib.import_module("make_memory_figure")


def test_the_figure_in_the_readme_is_what_its_script_draws(tmp_path, monkeypatch):
    script = load_figure_script(monkeypatch)
    monkeypatch.setattr(script, "__file__", str(tmp_path / "script.py"))
    script.main()
    drawn = (tmp_path / "memory.svg").read_text()
    committed = (REPOSITORY / "docs" / "figures" / "memory.svg").read_text()
    texts = [re.findall(r"<!-- (.*?) -->", svg) for svg in (drawn, committed)]  # glyphs may differ between machines
    assert texts[0] == texts[1]
    assert {"XLM-R", "full", "partial"} <= set(texts[0])


def test_the_readmes_bytes_are_those_of_the_figure(monkeypatch):
    config, kept_rows = load_figure_script(monkeypatch).MODELS["XLM-R"]
    estimate = lv.estimate_memory(config, kept_rows, precision="fp32")
    text = (REPOSITORY / "README.md").read_text()
    sizes = [f"{footprint.total_bytes / 1e9:.2f} GB" for footprint in (estimate.full, estimate.partial)]
    assert f"XLM-R {sizes[0]} and {sizes[1]}" in text
    parameters = [f"{footprint.num_parameters / 1e6:.0f} M" for footprint in (estimate.full, estimate.partial)]
    assert f"{parameters[0]} → {parameters[1]} parameters" in text
    assert f"SST-2 uses {100 * kept_rows / config.vocab_size:.1f} % of XLM-R's 250,002 tokens" in text


@pytest.mark.slow
@pytest.mark.shared_data
def test_the_rows_in_the_figure_are_counted_on_real_text(shared, monkeypatch):
    import pyarrow.parquet

    names = {
        "RoBERTa": "roberta-base",
        "DeBERTaV3": "deberta-v3-base",
        "mBERT": "bert-base-multilingual-cased",
        "XLM-R": "xlm-roberta-base",
    }
    files = sorted((shared / "data" / "glue").glob("sst2.*.parquet"))
    texts = [text for file in files for text in pyarrow.parquet.read_table(file)["sentence"].to_pylist()]
    for label, (config, kept_rows) in load_figure_script(monkeypatch).MODELS.items():
        tokenizer = transformers.AutoTokenizer.from_pretrained(shared / "data" / "tokenizers" / names[label])
        counts = lv.count_tokens(tokenizer(texts)["input_ids"], full_size=config.vocab_size)
        assert len(lv.PartialVocabulary.from_counts(counts, tokenizer=tokenizer)) == kept_rows, label


@pytest.mark.shared_data
def test_the_citation_names_the_paper(shared):
    title = (shared / "paper" / "paper.txt").read_text().splitlines()[0].strip()
    assert f"title: {title}" in (REPOSITORY / "CITATION.cff").read_text()


@pytest.mark.shared_data
def test_the_readmes_limit_is_the_papers_figure(shared):
    with (shared / "paper" / "tables" / "table2_embedding_reduction_percent.csv").open() as file:
        bert = next(row for row in csv.DictReader(file) if row["model"] == "BERT")
    assert 85 < 100 - float(bert["qqp"]) < 90  # "nearly nine tenths"
