"""A stranger's five jobs: each is two clicks from the README, and what is printed there runs, on small files."""

import os
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers
from own_process import run_program
from runs import run
from texts import CHAT_TEMPLATE, chats, language_tokenizer, pairs, rows, save_language_model, save_pretrained, write

import leanvocab as lv

REPOSITORY = Path(__file__).parents[2]
QUICK = ("--epochs", "1", "--cpu")


def linked(page: Path) -> list[Path]:
    """The page, and the pages that it links to."""
    targets = re.findall(r"\]\(([^)#:\s]+\.md)", page.read_text())
    return [page, *((page.parent / target).resolve() for target in targets)]


def pages() -> list[Path]:
    return list(dict.fromkeys(page for start in linked(REPOSITORY / "README.md") for page in linked(start)))


def printed(language: str, words: str) -> str:
    """The one snippet, two clicks from the README at most, that has these words, or the line of it if it is one of commands."""
    found = []
    for page in pages():
        for block in re.findall(rf"^```{language}(?: hub)?\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            lines = block.splitlines() if language == "bash" else [block]
            found += [line.partition("  #")[0] for line in lines if all(word in line for word in words.split())]
    assert found, f"no page has {words!r}"
    return found[0]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_classifier_from_a_csv(here: Path) -> None:
    save_pretrained(here / "FacebookAI" / "xlm-roberta-base")
    write(here / "reviews.csv", rows(48, kind="str"))
    run(*shlex.split(printed("bash", "leanvocab finetune reviews.csv"))[1:], *QUICK)
    assert (here / "out" / "model.safetensors").exists()


def test_an_estimate_for_a_card(here: Path) -> None:
    save_pretrained(here / "FacebookAI" / "xlm-roberta-base")
    line = shlex.split(printed("bash", "leanvocab estimate --rows"))
    line[line.index("--rows") + 1] = "60"  # of a small model
    assert "a card of 8 GB" in run(*line[1:]).stdout


def test_qlora_on_chats(here: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    line = shlex.split(printed("bash", "leanvocab finetune chats.jsonl --qlora"))
    tokenizer = language_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    save_language_model(here / line[2], "llama", tokenizer, tied=True, hidden_size=64, intermediate_size=64)
    write(here / "chats.jsonl", chats(24))
    # In a process of its own, as for a person: bitsandbytes, peft and transformers warn of one another.
    code, said = run_program(
        "leanvocab", [*line[1:], *QUICK], {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}, None, here
    )
    assert code == 0, said[-2000:]
    assert (here / "adapter" / "adapter_model.safetensors").exists()


def test_sentence_embeddings(here: Path) -> None:
    pytest.importorskip("sentence_transformers")
    save_pretrained(here / "intfloat" / "multilingual-e5-small")
    write(here / "pairs.csv", pairs(48, names=("anchor", "positive")))
    (here / "job.py").write_text(
        f"import os\nos.chdir({str(here)!r})\n" + printed("python", "SentenceTransformerTrainer shrink_trainer_")
    )
    code, said = run_program(here / "job.py", [], {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}, None, here)
    assert code == 0, said[-2000:]
    assert (here / "out" / "final" / "model.safetensors").exists()


def test_merging_a_delta(here: Path) -> None:
    save_pretrained(here / "saved")
    model = transformers.AutoModelForSequenceClassification.from_pretrained("saved")
    size = model.get_input_embeddings().num_embeddings
    lv.shrink_(model, lv.PartialVocabulary([0, 1, 5], size))
    with torch.no_grad():
        model.get_input_embeddings().weight += 1
    lv.save_delta(model, "delta")
    run(*shlex.split(printed("bash", "leanvocab merge saved delta --verify"))[1:])
    assert sorted(os.listdir("merged")) >= ["config.json", "model.safetensors"]
