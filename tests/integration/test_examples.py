"""Every example runs as a user runs it, on a small model and a small file, and stays short enough to read."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from own_process import run_program
from texts import language_model, language_tokenizer, pairs, rows, save_language_model, save_pretrained, write

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
LANGUAGE_MODELS = {  # tied, as published ones are
    "causal_lm": "gpt2", "masked_lm": "bert", "qlora": "llama", "seq2seq_lm": "t5", "trl_dpo": "gpt2", "trl_grpo": "gpt2",
    "trl_sft": "gpt2",
}  # fmt: skip
PACKAGES = {"lora": "peft", "new_tokens": "peft", "ray_counting": "ray", "sentence_embeddings": "sentence_transformers"}
PACKAGES["multilingual_embeddings"] = "sentence_transformers"
PACKAGES |= {"qlora": "bitsandbytes", "eight_bit_adam": "bitsandbytes", "zero3": "deepspeed"}
PACKAGES |= dict.fromkeys(["trl_dpo", "trl_grpo", "trl_reward", "trl_sft"], "trl")
LAUNCHED = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCHERS = {
    "fsdp2": LAUNCHED,
    "zero3": LAUNCHED,
    "accelerate_loop": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"],
}


def table_for(example: str) -> list[dict[str, Any]]:
    """Rows as an example takes them."""
    if example == "seq2seq_lm":
        return pairs(48, names=("source", "target"))
    if example in ("sentence_embeddings", "multilingual_embeddings"):
        return pairs(48, names=("anchor", "positive"))
    if example in ("trl_sft", "trl_grpo"):
        return pairs(48)
    if example in ("trl_dpo", "trl_reward"):
        chosen = pairs(48, names=("prompt", "chosen"))
        return [{**each, "rejected": other["chosen"]} for each, other in zip(chosen, chosen[::-1], strict=True)]
    return rows()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_saves(example: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec(PACKAGES.get(example.stem, "transformers")) is None:
        pytest.skip(f"needs {PACKAGES[example.stem]}")
    if example.stem in LANGUAGE_MODELS:
        save_language_model(tmp_path / "model", LANGUAGE_MODELS[example.stem], tied=True)
    elif example.stem == "new_tokens":
        save_language_model(tmp_path / "model", "llama", tied=True)
    elif example.stem == "fsdp2":
        save_language_model(tmp_path / "model", "llama", tied=False)
    elif example.stem == "trl_reward":
        language_model("llama", num_labels=1, pad_token_id=0).save_pretrained(tmp_path / "model")
        language_tokenizer().save_pretrained(tmp_path / "model")
    else:
        save_pretrained(tmp_path / "model")
    write(tmp_path / "data.csv", table_for(example.stem))
    words = [str(tmp_path / name) for name in ("model", "data.csv", "output")]
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    code, printed = run_program(example, words, environment, LAUNCHERS.get(example.stem), tmp_path)
    assert code == 0, printed[-2000:]
    saved = {path.name for path in (tmp_path / "output").iterdir()}
    assert saved & {"model.safetensors", "adapter_model.safetensors", "vocabulary.json"}
    if example.stem in LANGUAGE_MODELS:
        assert "of 500 rows, output='frozen'" in printed
    if example.stem == "new_tokens":
        assert "trained 10 of 315 rows, output='frozen'" in printed
        assert (tmp_path / "output" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_at_most_forty_lines(example: Path) -> None:
    assert len(example.read_text().splitlines()) <= 40
