"""A proof of a trim holds where texts and values are the same, says how others differ, and fails where something is wrong."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import TEXT, make_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from texts import small_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from leanvocab import PartialVocabulary, count_tokens
from leanvocab.errors import CheckpointError, DataError
from leanvocab.trimming.proof import Proof, prove

FULL_SIZE = 500
COVERED = ["word3 word9", "word9 word120 word3", "word4"]
OTHER = ["word3 word5 word9", "word77"]


def naive_trim(full: Path, trimmed: Path, vocabulary: PartialVocabulary) -> None:
    """A tokenizer of words alone, and every tensor that has as many rows as the full vocabulary."""
    content = json.loads((full / "tokenizer.json").read_text())
    new_ids = {old: new for new, old in enumerate(vocabulary)}
    words = content["model"]["vocab"]
    content["model"]["vocab"] = {word: new_ids[old] for word, old in words.items() if old in new_ids}
    trimmed.mkdir()
    (trimmed / "tokenizer.json").write_text(json.dumps(content))
    (trimmed / "tokenizer_config.json").write_bytes((full / "tokenizer_config.json").read_bytes())
    config = json.loads((full / "config.json").read_text())
    (trimmed / "config.json").write_text(json.dumps(config | {"vocab_size": len(vocabulary)}))
    ids = torch.tensor(vocabulary.token_ids)
    tensors = {
        name: tensor.index_select(tensor.shape.index(FULL_SIZE), ids) if FULL_SIZE in tensor.shape else tensor
        for name, tensor in load_file(full / "model.safetensors").items()
    }
    save_file(tensors, trimmed / "model.safetensors", {"format": "pt"})


def folders(tmp_path: Path, family: str = "bert-untied") -> tuple[Path, Path, PartialVocabulary]:
    full, trimmed = tmp_path / "full", tmp_path / "trimmed"
    make_model(family, TEXT).save_pretrained(full)
    tokenizer = small_tokenizer()
    tokenizer.save_pretrained(full)
    counts = count_tokens(COVERED, tokenizer=tokenizer)
    vocabulary = PartialVocabulary.from_counts(counts, full_size=FULL_SIZE, tokenizer=tokenizer)
    naive_trim(full, trimmed, vocabulary)
    return full, trimmed, vocabulary


def shown(proof: Proof) -> str:
    console = Console(file=io.StringIO(), width=200, markup=False)
    for part in proof.printed():
        console.print(part)
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "family", ["bert-untied", "bert-tied", "llama-untied", "gpt2-tied", "t5-untied", "bart-untied"]
)
def test_covered_texts_have_the_same_tokens_and_the_same_bits(tmp_path: Path, family: str) -> None:
    full, trimmed, vocabulary = folders(tmp_path, family)
    proof = prove(full, trimmed, vocabulary, COVERED + COVERED)
    assert proof.holds
    assert (proof.total.texts, proof.total.covered_texts, proof.model_texts) == (6, 6, 3)
    logits = proof.outputs["logits"]
    assert logits.is_cut
    # Padded to the longest text of the batch, which is five tokens long.
    assert logits.values == 3 * 5 * len(vocabulary)
    layers = [output for name, output in proof.outputs.items() if "hidden_states[" in name]
    assert len(layers) >= 2
    assert all(output.differing == 0 and not output.is_cut for output in layers)
    assert "The proof holds." in shown(proof)
    assert json.loads(json.dumps(proof.to_dict()))["outputs"]["logits"]["holds"]


def test_other_texts_are_told_in_words_by_language(tmp_path: Path) -> None:
    full, trimmed, vocabulary = folders(tmp_path)
    rows = [{"text": text, "lang": "de"} for text in COVERED] + [{"text": text, "lang": "sw"} for text in OTHER]
    data = {"test": Dataset.from_list(rows)}
    proof = prove(full, trimmed, vocabulary, data, language_column="lang", model_texts=0)
    assert proof.holds
    assert set(proof.splits) == {"de", "sw"}
    other = proof.splits["sw"]
    assert (other.texts, other.covered_texts, other.words, other.changed_words) == (2, 0, 4, 2)
    assert (other.tokens_before, other.tokens_after) == (8, 8)
    assert (other.unknown_before, other.unknown_after) == (0, 2)
    assert [(change.word, change.before, change.after) for change in proof.changed_words] == [
        ("word5", ("word5",), ("[UNK]",)),
        ("word77", ("word77",), ("[UNK]",)),
    ]
    assert "word77: word77 → [UNK] (1)" in shown(proof)
    columns = {name: [row[name] for row in rows] for name in ("text", "lang")}
    assert prove(full, trimmed, vocabulary, columns, language_column="lang", model_texts=0).splits == proof.splits
    assert set(prove(full, trimmed, vocabulary, columns, model_texts=0).splits) == {"texts"}
    with pytest.raises(DataError, match=r"'test' has no column 'language' .* its columns are text, lang"):
        prove(full, trimmed, vocabulary, data, language_column="language")


def test_pairs_are_compared_as_pairs(tmp_path: Path) -> None:
    full, trimmed, vocabulary = folders(tmp_path)
    pairs = Dataset.from_list(
        [{"premise": "word3 word9", "hypothesis": "word4"}, {"premise": "word4", "hypothesis": "word5 word4"}]
    )
    proof = prove(full, trimmed, vocabulary, {"train": pairs})
    assert (proof.total.texts, proof.total.words, proof.total.covered_texts) == (2, 6, 1)
    assert proof.total.tokens_before == 2 * 3 + 3 + 3
    assert proof.total.changed_words == 1
    assert proof.model_texts == 1
    assert proof.holds


def spoiled(trimmed: Path, name: str, change: Any) -> None:
    tensors = load_file(trimmed / "model.safetensors")
    change(tensors[name])
    save_file(tensors, trimmed / "model.safetensors", {"format": "pt"})


def test_a_wrong_row_a_wrong_token_and_a_wrong_bias_make_it_fail(tmp_path: Path) -> None:
    full, trimmed, vocabulary = folders(tmp_path)
    table, bias = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.bias"
    used = vocabulary.to_partial(5 + 9)  # word9
    spoiled(trimmed, table, lambda rows: rows[used, :1].add_(2e-7))
    proof = prove(full, trimmed, vocabulary, COVERED)
    assert not proof.holds
    assert proof.outputs["hidden_states[0]"].differing > 0
    assert "DIFFERS" in shown(proof)
    assert "does NOT hold: do not use this folder" in shown(proof)
    spoiled(trimmed, table, lambda rows: rows.copy_(load_file(full / "model.safetensors")[table][list(vocabulary)]))
    assert prove(full, trimmed, vocabulary, COVERED).holds
    spoiled(trimmed, bias, lambda values: values[used].add_(0.01))
    proof = prove(full, trimmed, vocabulary, COVERED)
    assert not proof.outputs["logits"].holds
    assert proof.outputs["hidden_states[1]"].holds
    content = json.loads((trimmed / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["word3"], words["word9"] = words["word9"], words["word3"]
    (trimmed / "tokenizer.json").write_text(json.dumps(content))
    proof = prove(full, trimmed, vocabulary, COVERED, model_texts=0)
    assert (proof.holds, proof.num_wrong) == (False, 2)
    assert "2 covered texts are split otherwise, such as 'word3 word9'" in shown(proof)


def test_rounding_is_allowed_for_logits_alone(tmp_path: Path) -> None:
    full, trimmed, vocabulary = folders(tmp_path)
    spoiled(trimmed, "cls.predictions.decoder.bias", lambda values: values.add_(1e-8))
    proof = prove(full, trimmed, vocabulary, COVERED)
    logits = proof.outputs["logits"]
    assert logits.holds
    assert 0 < logits.largest_difference <= logits.allowed < 1e-4
    assert " rounding " in shown(proof)


def byte_level(*merges: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with some merges, beginning and end of sequence first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, *(merge.replace(" ", "") for merge in merges)]
    pairs = [tuple(merge.split()) for merge in merges]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=None, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_words_whose_pieces_were_dropped_are_split_into_more_tokens_and_words_beside_them_are_not_counted(
    tmp_path: Path,
) -> None:
    byte_level("Ġ t", "h e", "Ġt he", "c a", "ca t").save_pretrained(tmp_path / "full")
    byte_level("Ġ t", "h e", "Ġt he").save_pretrained(tmp_path / "trimmed")  # the last two ids have gone
    vocabulary = PartialVocabulary(range(2 + 256 + 3), 2 + 256 + 5)
    texts = ["a cat the\tcät", "cat", "the the", " \n", ""]
    proof = prove(tmp_path / "full", tmp_path / "trimmed", vocabulary, texts, model_texts=0)
    assert proof.holds
    assert (proof.total.covered_texts, proof.total.words, proof.total.changed_words) == (3, 7, 2)
    (change,) = proof.changed_words  # white space alone is no part of a word
    assert (change.word, change.before, change.after, change.count) == ("cat", ("cat",), ("c", "a", "t"), 2)


def test_what_cannot_be_compared_is_refused_by_name(tmp_path: Path) -> None:
    full, trimmed, vocabulary = folders(tmp_path)

    class WantsImages(torch.nn.Module):
        config = make_model("bert-untied", TEXT).config

        def forward(self, **inputs: Any) -> None:
            raise ValueError("You have to specify pixel_values\nand more")

    told = r"WantsImages cannot be run on texts alone \(You have to specify pixel_values\): .* with model_texts=0"
    with pytest.raises(CheckpointError, match=told):
        prove(full, trimmed, vocabulary, COVERED, full_model=WantsImages())

    class InPython:
        is_fast = False

    with pytest.raises(CheckpointError, match=r"InPython works in Python, .* expected a tokenizer\.json"):
        prove(full, trimmed, vocabulary, COVERED, tokenizer=InPython())


def test_texts_that_are_none_and_folders_that_hold_nothing_are_errors(tmp_path: Path) -> None:
    full, trimmed, vocabulary = folders(tmp_path)
    with pytest.raises(DataError, match="expected texts to prove it with, got none"):
        prove(full, trimmed, vocabulary, [])
    with pytest.raises(CheckpointError, match="nowhere' cannot be loaded to prove it"):
        prove(full, tmp_path / "nowhere", vocabulary, COVERED)
