"""Commands about language models: estimates of what their output layers hold, and what `info` says of them."""

import pytest
import transformers
from runs import json_of, run, text_of
from texts import pairs, save_language_model, write_language_splits

pytestmark = pytest.mark.usefixtures("loud_libraries_afterwards")

ROWS, KEPT = 320, 40


def save_llama(folder, **changes):
    sizes = {
        "vocab_size": ROWS, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes))
    model.save_pretrained(folder)
    return folder


# --- estimate --------------------------------------------------------------------------------------------------------


def test_an_estimate_is_of_a_task_and_an_output_mode(tmp_path):
    base = save_llama(tmp_path / "base", tie_word_embeddings=True)
    of_lm = ("estimate", base, "--rows", KEPT, "--task", "causal-lm")
    frozen = json_of(*of_lm)
    assert frozen["output"] == "frozen"
    assert frozen["partial"]["frozen_bytes"] == (ROWS - KEPT) * 16 * 4 + 2 * 8 * ROWS
    assert json_of(*of_lm, "--frozen-rows", "host")["partial"]["frozen_bytes"] == 0
    restricted = json_of(*of_lm, "--output", "restricted")
    assert (restricted["output"], restricted["partial"]["frozen_bytes"]) == ("restricted", 0)
    assert frozen["full"]["loss_bytes"] == 0
    assert json_of(*of_lm, "--num-tokens", 100)["full"]["loss_bytes"] == 3 * 4 * 100 * ROWS
    assert "40 of 320 rows, adamw, fp32, output frozen" in text_of(*of_lm)
    assert "frozen rows" in text_of(*of_lm)
    assert json_of("estimate", base, "--rows", KEPT)["output"] is None


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--task", "chatting"), 2, "--task must be one of classification, regression, causal-lm"),
        (("--task", "causal-lm", "--output", "small"), 2, "--output must be one of full, frozen, restricted"),
        (("--task", "causal-lm", "--frozen-rows", "disk"), 2, "--frozen-rows must be one of device, host"),
        (("--task", "causal-lm", "--auto-class", "AutoModelForCausalLM"), 2, "give one of them"),
        (("--task", "causal-lm", "--output", "full"), 1, "--output full needs an untied model"),
        (("--output", "restricted"), 2, "--output is for causal-lm and seq2seq-lm and masked-lm"),
    ],
)
def test_an_estimate_that_cannot_be_is_an_error(tmp_path, words, code, message):
    base = save_llama(tmp_path / "base", tie_word_embeddings=True)
    assert message in run("estimate", base, "--rows", KEPT, *words, code=code).stderr


@pytest.mark.parametrize(("task", "family"), [("causal-lm", "llama"), ("seq2seq-lm", "t5")])
def test_an_estimate_and_a_run_read_the_same_prompts_and_completions(tmp_path, task, family):
    base = save_language_model(tmp_path / "base", family)
    data = write_language_splits(tmp_path / "data", pairs)
    options = ("--task", task, "--max-length", "32", "--batch-size", "6", "--cpu")
    ran = json_of("finetune", base, data, "-o", tmp_path / "out", "--epochs", "1", *options)
    estimated = json_of("estimate", base, "--data", data, *options)
    assert estimated["tables"][0]["partial_rows"] == ran["vocabulary"]["kept_rows"]
    assert estimated["partial"]["total_bytes"] == ran["memory"]["partial"]["total_bytes"]


# --- info ------------------------------------------------------------------------------------------------------------


def test_info_lists_every_vocabulary_sized_tensor_and_what_becomes_of_it(tmp_path):
    described = json_of("info", save_llama(tmp_path / "tied", tie_word_embeddings=True))
    (only,) = described["inventory"]["tensors"]
    assert only["names"] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert (only["dtype"], only["num_bytes"]) == ("F32", ROWS * 16 * 4)
    assert only["ratio"] == ROWS * 16 * 4 / described["num_bytes"]
    assert only["outcomes"] == {"frozen": "partial", "restricted": "partial"}
    assert described["inventory"]["default_mode"] == "frozen"
    shown = text_of("info", tmp_path / "tied")
    assert "frozen*" in shown
    assert "full: LlamaForCausalLM: the input table model.embed_tokens.weight is tied" in shown
    untied = json_of("info", save_llama(tmp_path / "untied", tie_word_embeddings=False))["inventory"]["tensors"]
    assert {each["names"][0]: each["outcomes"]["full"] for each in untied} == {
        "model.embed_tokens.weight": "partial",
        "lm_head.weight": "stays whole",
    }


@pytest.fixture
def delta(tmp_path):
    import leanvocab as lv

    base = save_llama(tmp_path / "base", tie_word_embeddings=True)
    model = lv.shrink_(transformers.LlamaForCausalLM.from_pretrained(base), lv.PartialVocabulary(range(KEPT), ROWS))
    model.model.norm.weight.data.add_(1)
    return lv.save_delta(model, tmp_path / "delta")


def test_info_says_what_a_delta_is(delta, tmp_path):
    described = json_of("info", delta)
    assert (described["kind"], described["output"], described["base"]) == ("delta", "frozen", str(tmp_path / "base"))
    table = described["tables"]["model.embed_tokens.weight"]
    assert (table["kept_rows"], table["full_rows"], len(table["digest"])) == (KEPT, ROWS, 64)
    assert (described["tensors"], described["new"]) == (["model.norm.weight"], [])
    assert described["num_bytes"] == (KEPT * 16 + 16) * 4
    assert described["base_bytes"] == json_of("info", tmp_path / "base")["num_bytes"]
    assert described["has_optimizer"] is False
    shown = text_of("info", delta)
    assert 'output="frozen"' in shown
    assert "40 of 320 rows (12.5%)" in shown
    assert described["to_merge"] == f"leanvocab merge {tmp_path / 'base'} DELTA OUTPUT"


def test_info_of_a_delta_takes_no_base_and_refuses_a_broken_one(delta, tmp_path):
    assert "leave --base out" in run("info", delta, "--base", tmp_path / "base", code=2).stderr
    (delta / "leanvocab.json").write_text("{}")
    assert "leanvocab.json: expected format 'leanvocab delta'" in run("info", delta, code=1).stderr


def test_info_says_that_a_merged_model_was_trained_for_another_objective(tmp_path):
    import warnings

    import leanvocab as lv

    base = save_llama(tmp_path / "base", tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lv.errors.LeanVocabWarning)  # what a restricted softmax is
        lv.shrink_(model, lv.PartialVocabulary(range(KEPT), ROWS), output="restricted")
    lv.save_full(model, tmp_path / "out")
    assert json_of("info", tmp_path / "out")["training"]["output"] == "restricted"
    assert json_of("info", base)["training"] is None
    assert "another objective than the full model's" in text_of("info", tmp_path / "out")
