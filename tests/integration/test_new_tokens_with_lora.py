"""New tokens beside LoRA and QLoRA: their rows train with the adapter, and are saved in it, alone."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import EXACT, FULL_SIZE, batch, language_batch, make_model, small_lm, small_model
from peft import LoraConfig, PeftModel, get_peft_model
from references import check_close, masked_run
from safetensors import safe_open
from torch import Tensor

import leanvocab as lv
from doors.qlora import quantized
from leanvocab.adapters.exporting import export_trainable_tokens
from leanvocab.errors import CheckpointError, ModelError
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

NEW_IDS = list(range(FULL_SIZE - 10, FULL_SIZE))
NEW = PartialVocabulary(NEW_IDS, FULL_SIZE)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft reads a deprecated name
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),  # peft does tie these
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
]


def inputs() -> dict[str, Tensor]:
    its = {name: value.clone() for name, value in language_batch().items()}
    its["input_ids"][:, 3] = its["labels"][:, 3] = torch.arange(FULL_SIZE - 6, FULL_SIZE)
    return its


def tables(model: Any) -> list[Any]:
    """Input and output table, once where they are one."""
    weights = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return list({id(weight): weight for weight in weights}.values())


def adapted(model: Any, *, lean: bool) -> Any:
    """LoRA, and rows that train beside it: those of new tokens, or in full."""
    return with_lora(lv.shrink_(model, NEW, on_missing="frozen", output="frozen") if lean else model)


def with_lora(model: Any) -> Any:
    torch.manual_seed(3)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped: Any = get_peft_model(model, config)  # type: ignore[arg-type]
    for weight in tables(wrapped):
        weight.requires_grad_(True)
    return wrapped


def run(model: Any, *, masks: bool = False) -> tuple[list[float], torch.optim.Optimizer]:
    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)

    return masked_run(model, inputs(), NEW if masks else None, sgd, steps=4)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**inputs()).logits.clone()
        return found


@pytest.mark.parametrize("family", ["llama-tied", "llama-untied"])
def test_rows_of_new_tokens_train_beside_lora_as_in_a_full_run_with_masked_gradients(family: str) -> None:
    full, lean = adapted(small_lm(family), lean=False), adapted(small_lm(family), lean=True)
    of_full, _ = run(full, masks=True)
    of_lean, optimizer = run(lean)
    assert of_lean == pytest.approx(of_full, rel=1e-5)
    rows = {id(weight) for weight in tables(lean)}
    states = {id(weight): state for weight, state in optimizer.state.items() if id(weight) in rows}
    assert [tuple(state["momentum_buffer"].shape) for state in states.values()] == [(10, 32)] * len(rows)
    lv.merge_(lean)
    check_close(dict(lean.named_parameters()), dict(full.named_parameters()), 1e-4)


@pytest.mark.parametrize("family", ["llama-tied", "llama-untied", "gemma2-softcap"])
def test_lora_and_rows_are_one_adapter_which_peft_loads_to_the_same_logits(family: str, tmp_path: Path) -> None:
    small_lm(family).save_pretrained(tmp_path / "base")
    kind: Any = type(small_lm(family))
    model = adapted(kind.from_pretrained(tmp_path / "base"), lean=True)
    num_tables = len(tables(model))
    run(model)
    assert export_trainable_tokens(model, tmp_path / "adapter") == tmp_path / "adapter"
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys() if "lora_" not in name]  # noqa: SIM118
    assert shapes == [[10, 32]] * num_tables
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(map(tuple, config["trainable_token_indices"].values())) == {tuple(NEW_IDS)}
    loaded = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    trained = logits(lv.merge_(model))
    assert torch.equal(logits(loaded), trained)
    check_close({"merged": logits(loaded.merge_and_unload())}, {"merged": logits(model.merge_and_unload())}, 1e-6)


def test_a_classifier_that_trains_beside_lora_is_in_the_adapter_too(tmp_path: Path) -> None:
    small_model("llama").save_pretrained(tmp_path / "base")
    kind: Any = type(small_model("llama"))
    model = lv.shrink_(kind.from_pretrained(tmp_path / "base"), NEW, on_missing="frozen")
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    model.get_input_embeddings().weight.requires_grad_(True)
    its = batch() | {"input_ids": inputs()["input_ids"]}
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.05)
    model.train()(**its).loss.backward()
    optimizer.step()
    export_trainable_tokens(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**its).logits, model.eval()(**its).logits)


def test_a_base_with_fewer_rows_is_refused_and_says_that_the_resized_one_is_saved_first(tmp_path: Path) -> None:
    make_model("llama-tied", EXACT, vocab_size=FULL_SIZE - 10).save_pretrained(tmp_path / "base")
    model: Any = type(small_lm("llama-tied")).from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(FULL_SIZE)
    model.save_pretrained(tmp_path / "resized")
    unadapted = lv.shrink_(copy.deepcopy(model), NEW, on_missing="frozen")
    model = adapted(model, lean=True)
    words = "found 490; if tokens were added, save the resized model"
    with pytest.raises(CheckpointError, match=words):
        lv.save_delta(unadapted, tmp_path / "delta")
    for each in (unadapted, model):
        with pytest.raises(CheckpointError, match=words):
            export_trainable_tokens(each, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    export_trainable_tokens(model, tmp_path / "adapter", base=tmp_path / "resized")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "resized")


def _norms_too(model: Any) -> Any:
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


def _on_the_table(model: Any) -> Any:
    return get_peft_model(model.unload(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "embed_tokens"]))


def _saved_whole(model: Any) -> Any:
    options: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    return get_peft_model(model.unload(), LoraConfig(task_type="CAUSAL_LM", **options))


def _another_kind(model: Any) -> Any:
    from peft import IA3Config

    options: dict[str, Any] = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    return get_peft_model(model.unload(), IA3Config(task_type="CAUSAL_LM", **options))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_norms_too, r"holds LoRA and rows alone, and 1 other parameters train.*model\.norm\.weight"),
        (_on_the_table, r"embed_tokens has an adapter of its own"),
        (_saved_whole, r"embed_tokens has an adapter of its own"),
        (_another_kind, r"one adapter with LoRA.*active are: IA3"),
    ],
)
def test_what_the_adapter_has_no_place_for_is_refused(change: Any, words: str, tmp_path: Path) -> None:
    small_lm("llama-untied").save_pretrained(tmp_path / "base")
    model = adapted(type(small_lm("llama-untied")).from_pretrained(tmp_path / "base"), lean=True)
    with pytest.raises(ModelError, match=words):
        export_trainable_tokens(change(model), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_rows_that_were_decayed_are_not_the_bases(tmp_path: Path) -> None:
    small_lm("llama-untied").save_pretrained(tmp_path / "base")
    model: Any = type(small_lm("llama-untied")).from_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.get_input_embeddings().weight[5] += 1
    with pytest.raises(ModelError, match=r"rows outside the vocabulary differ from those of"):
        export_trainable_tokens(adapted(model, lean=True), tmp_path / "adapter")


@pytest.mark.parametrize("family", ["llama-tied", "llama-untied"])
def test_rows_of_new_tokens_train_beside_qlora(family: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from peft import prepare_model_for_kbit_training

    def prepared(*, lean: bool) -> Any:
        model = quantized(tmp_path, family)
        if lean:
            lv.shrink_(model, NEW, on_missing="frozen", output="frozen")
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

    full, lean = with_lora(prepared(lean=False)), with_lora(prepared(lean=True))
    of_full, _ = run(full, masks=True)
    of_lean, _ = run(lean)
    assert of_lean == pytest.approx(of_full, rel=1e-3)  # layers compute in bf16
    export_trainable_tokens(lean, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(prepared(lean=False), tmp_path / "adapter")
    check_close({"logits": logits(loaded)}, {"logits": logits(lean)}, 1e-2)
    assert torch.equal(logits(loaded), logits(lv.merge_(lean)))
