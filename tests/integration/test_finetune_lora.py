"""`leanvocab finetune --lora` and `--qlora`: the adapter of an ordinary run, which loads on the whole pretrained model."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from own_process import run_program
from runs import json_of
from safetensors import safe_open
from texts import pairs, rows, save_language_model, save_pretrained, texts, write

from leanvocab.errors import MissingExtraError
from leanvocab.finetune.job import finetune
from leanvocab.finetune.settings import FineTuneSettings

pytest.importorskip("peft")


def run(folder: Path, name: str, *options: str, launcher: tuple[str, ...] | None = None) -> dict[str, Any]:
    words = ["finetune", str(folder / "model"), str(folder / "data.csv")]
    words += ["-o", str(folder / name), "--max-steps", "4", "--logging-steps", "1", "--max-length", "32", "--cpu"]
    words += ["--dropout", "-1", "--save-strategy", "no", "--json", *options]
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    code, printed = run_program("leanvocab", words, environment, None if launcher is None else list(launcher), folder)
    assert code == 0, printed[-5000:]
    result: dict[str, Any] = json.loads((folder / name / "finetune.json").read_text())
    return result


def test_the_adapter_and_the_losses_are_those_of_a_run_with_the_full_vocabulary(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "model")
    write(tmp_path / "data.csv", rows())
    shrunk = run(tmp_path, "shrunk", "--lora")
    full = run(tmp_path, "full", "--lora", "--full-vocabulary")
    assert shrunk["losses"] == full["losses"]
    assert shrunk["weights_bytes"] < full["weights_bytes"]
    assert shrunk["num_parameters"] == full["num_parameters"]
    check_estimate(shrunk, full)
    adapter = "adapter_model.safetensors"
    assert (tmp_path / "shrunk" / adapter).read_bytes() == (tmp_path / "full" / adapter).read_bytes()
    assert not (tmp_path / "shrunk" / "model.safetensors").exists()


def test_a_head_of_several_layers_trains_whole_and_is_saved(tmp_path: Path) -> None:
    """peft takes every layer for a head whose name ends as one's, and would have put LoRA on it first."""
    sizes = {"dim": 32, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}
    config = transformers.DistilBertConfig(vocab_size=305, max_position_embeddings=64, pad_token_id=0, **sizes)
    save_pretrained(tmp_path / "model", transformers.DistilBertForMaskedLM(config))
    write(tmp_path / "data.csv", rows())
    shrunk = run(tmp_path, "shrunk", "--lora")
    full = run(tmp_path, "full", "--lora", "--full-vocabulary")
    assert shrunk["losses"] == full["losses"]
    check_estimate(shrunk, full)
    with safe_open(tmp_path / "shrunk" / "adapter_model.safetensors", "pt") as file:
        saved = set(file.keys())
    heads = {
        f"base_model.model.{head}.{kind}" for head in ("pre_classifier", "classifier") for kind in ("weight", "bias")
    }
    assert heads <= saved
    assert not any("classifier.lora" in name for name in saved)


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning"  # peft 0.21 reads a name that transformers 5.23 has deprecated
)
@pytest.mark.usefixtures("loud_libraries_afterwards")
@pytest.mark.parametrize(
    ("task", "family", "more"),
    [
        ("causal-lm", "llama", ("--output", "full")),
        pytest.param("causal-lm", "llama-tied", ("--bf16",), marks=pytest.mark.slow),
        pytest.param("seq2seq-lm", "t5", (), marks=pytest.mark.slow),
    ],
)
def test_qlora_trains_a_language_model_that_was_loaded_in_four_bits(
    tmp_path: Path, task: str, family: str, more: tuple[str, ...]
) -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 64} if "llama" in family else {"d_model": 64, "d_ff": 64}
    save_language_model(tmp_path / "model", family.removesuffix("-tied"), tied=family != "llama", **sizes)
    write(tmp_path / "data.csv", pairs(24))
    options = ("--qlora", "--task", task)
    shrunk = run(tmp_path, "shrunk", *options, *more)
    if more == ("--output", "full"):
        full = run(tmp_path, "full", *options, "--full-vocabulary")
        assert shrunk["losses"] == full["losses"]
        assert shrunk["weights_bytes"] < full["weights_bytes"]
        check_estimate(shrunk, full)
    estimated = json_of("estimate", tmp_path / "model", "--rows", shrunk["vocabulary"]["kept_rows"], *options, *more)
    for vocabulary in ("full", "partial"):
        ran = shrunk["memory"][vocabulary] | {"peak_bytes": 0}
        assert estimated[vocabulary] == ran
    assert estimated["precision"] == shrunk["memory"]["precision"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # as above
@pytest.mark.usefixtures("loud_libraries_afterwards")
@pytest.mark.parametrize(
    "family",
    [
        "Bert",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("XLMRoberta", "ModernBert", "DebertaV2")),
    ],
)
def test_qlora_trains_a_classifier_whose_head_is_not_in_four_bits(tmp_path: Path, family: str) -> None:
    """A head in 4 bits has no gradient: peft ended in "only Tensors of floating point dtype can require gradients"."""
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=305, max_position_embeddings=64, pad_token_id=0, **sizes
    )
    save_pretrained(tmp_path / "model", getattr(transformers, f"{family}ForMaskedLM")(config))
    write(tmp_path / "data.csv", rows())
    shrunk = run(tmp_path, "shrunk", "--qlora")
    estimated = json_of("estimate", tmp_path / "model", "--rows", shrunk["vocabulary"]["kept_rows"], "--qlora")
    for vocabulary in ("full", "partial"):
        assert estimated[vocabulary] == shrunk["memory"][vocabulary] | {"peak_bytes": 0}
    for name in ("gradients_bytes", "optimizer_bytes"):
        assert estimated["partial"][name] == shrunk[name]
    # bitsandbytes casts the biases beside weights in 4 bits to bf16 at their first use
    assert (
        0.98 * estimated["partial"]["weights_bytes"] < shrunk["weights_bytes"] <= estimated["partial"]["weights_bytes"]
    )


def check_estimate(shrunk: dict[str, Any], full: dict[str, Any]) -> None:
    """What was estimated is what training held, with and without the whole vocabulary: the adapter alone has states."""
    for vocabulary, result in (("partial", shrunk), ("full", full)):
        held = {name: result[name] for name in ("weights_bytes", "gradients_bytes", "optimizer_bytes")}
        assert {name: shrunk["memory"][vocabulary][name] for name in held} == held


TWO = ("--standalone", "--nproc-per-node", "2")


def test_two_processes_of_torchrun_write_the_model_of_a_run_with_the_full_vocabulary(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "model")
    write(tmp_path / "data.csv", rows())
    launcher = ("-m", "torch.distributed.run", *TWO)
    shrunk = run(tmp_path, "shrunk", "--batch-size", "4", launcher=launcher)
    full = run(tmp_path, "full", "--batch-size", "4", "--full-vocabulary", launcher=launcher)
    assert shrunk["num_steps"] == 4
    assert shrunk["losses"] == full["losses"]
    name = "model.safetensors"
    assert (tmp_path / "shrunk" / name).read_bytes() == (tmp_path / "full" / name).read_bytes()


@pytest.mark.slow  # torchrun, above, starts two processes too
def test_accelerate_launch_trains_an_adapter_of_a_language_model_in_bf16(tmp_path: Path) -> None:
    save_language_model(tmp_path / "model", "llama", tied=False)
    write(tmp_path / "data.csv", pairs(24))
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    options = ("--task", "causal-lm", "--lora", "--bf16")
    shrunk = run(tmp_path, "shrunk", *options, "--output", "full", launcher=launcher)
    full = run(tmp_path, "full", *options, "--full-vocabulary", launcher=launcher)
    assert shrunk["losses"] == full["losses"]
    adapter = "adapter_model.safetensors"
    assert (tmp_path / "shrunk" / adapter).read_bytes() == (tmp_path / "full" / adapter).read_bytes()


@pytest.mark.parametrize(("task", "family"), [("causal-lm", "llama"), ("seq2seq-lm", "t5"), ("masked-lm", "bert")])
def test_an_adapter_of_a_tied_language_model_trains_beside_frozen_rows(tmp_path: Path, task: str, family: str) -> None:
    save_language_model(tmp_path / "model", family, tied=True)
    write(tmp_path / "data.csv", texts(24) if task == "masked-lm" else pairs(24))
    result = run(tmp_path, "out", "--task", task, "--lora")
    assert result["output"] == "frozen"
    assert all(loss == loss for _, loss in result["losses"])
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("missing", "option", "extra"), [("peft", "lora", "peft"), ("bitsandbytes", "qlora", "quantization")]
)
def test_a_missing_extra_gives_the_pip_line_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, option: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    settings = FineTuneSettings(task="causal-lm", **{option: True})
    with pytest.raises(MissingExtraError, match=rf"this needs {missing}.*pip install 'leanvocab\[{extra}\]'"):
        finetune(tmp_path / "no model", tmp_path / "no data", tmp_path / "out", settings)
