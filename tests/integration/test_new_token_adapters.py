"""New tokens beside LoRA: their rows alone train, and go into one adapter of peft's with it."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import bits, differing
from disk import listing, read_all
from models import FULL_SIZE, language_batch, small_lm
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from references import check_close, mask_gradients
from torch import nn

import leanvocab as lv
from doors.qlora import quantized
from leanvocab.adapters.exporting import export_trainable_tokens
from leanvocab.errors import CheckpointError, ModelError
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

NEW = PartialVocabulary(range(FULL_SIZE - 10, FULL_SIZE), FULL_SIZE)
TABLES = {
    "llama-tied": ["model.embed_tokens"],
    "llama-untied": ["model.embed_tokens", "lm_head"],
    "gemma2-softcap": ["model.embed_tokens"],
    "bart-tied": ["model.shared"],
    "t5-tied": ["shared"],
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning"
)  # peft reads a deprecated name


def inputs() -> dict[str, torch.Tensor]:
    made = language_batch()
    made["input_ids"][:, 3] = made["labels"][:, 3] = torch.arange(FULL_SIZE - 6, FULL_SIZE)
    return made


def quietly_adapted(model: nn.Module, **options: Any) -> Any:
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of ties in words of its own
        return get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "v_proj"], **options})
        )


def loaded(base: nn.Module, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, folder).eval()


def with_rows(model: nn.Module, *, shrunk: bool, output: Any = None, **options: Any) -> Any:
    """LoRA, and the vocabulary matrices that train beside it."""
    if shrunk:
        lv.shrink_(model, NEW, on_missing="frozen", output=output)
    adapted = quietly_adapted(model, **options)
    for module in (adapted.get_input_embeddings(), *([adapted.get_output_embeddings()] if output == "frozen" else [])):
        module.weight.requires_grad_(True)
    return adapted


def train(model: Any, *, masks: bool, steps: int = 5) -> list[float]:
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs()).loss
        loss.backward()
        if masks:
            mask_gradients(model, NEW)
        optimizer.step()
        losses.append(float(loss.detach()))
    states = [state["momentum_buffer"].shape for state in optimizer.state.values()]
    assert masks or (10, 32) in states
    assert masks or (FULL_SIZE, 32) not in states
    return losses


@pytest.mark.parametrize(
    ("family", "output"), [("llama-untied", None), ("llama-untied", "frozen"), ("llama-tied", "frozen")]
)
def test_new_rows_train_beside_lora_as_in_the_full_model_whose_other_rows_have_no_gradient(
    family: str, output: Any
) -> None:
    full = with_rows(small_lm(family), shrunk=False, output=output)
    lean = with_rows(small_lm(family), shrunk=True, output=output)
    losses = train(full, masks=True), train(lean, masks=False)
    if output is None:
        assert losses[0] == losses[1]
        assert differing(full, lean) == []
    else:
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        lv.merge_(lean)
        check_close(dict(lean.named_parameters()), dict(full.named_parameters()), 1e-4)


@pytest.mark.parametrize("family", TABLES)
def test_new_rows_and_lora_are_one_adapter_that_peft_loads_to_the_same_logits(family: str, tmp_path: Path) -> None:
    small_lm(family).save_pretrained(tmp_path / "base")
    base = type(small_lm(family)).from_pretrained(tmp_path / "base")
    lean = with_rows(base, shrunk=True, output="frozen", target_modules="all-linear")
    train(lean, masks=False)
    export_trainable_tokens(lean, tmp_path / "adapter")
    assert listing(tmp_path / "adapter") == ["adapter_config.json", "adapter_model.safetensors"]
    rows = {name: value for name, value in read_all(tmp_path / "adapter").items() if "lora_" not in name}
    assert {name: len(value) for name, value in rows.items()} == {
        f"base_model.model.{path}.token_adapter.trainable_tokens_delta": 10 for path in TABLES[family]
    }
    adapted = loaded(type(small_lm(family)).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert lean.peft_config["default"].trainable_token_indices is None
    with torch.no_grad():
        expected = lv.merge_(lean).eval()(**inputs()).logits
        assert bits(adapted(**inputs()).logits) == bits(expected)
    assert differing(adapted.merge_and_unload(), lean.merge_and_unload()) == []


def test_what_one_adapter_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    base = small_lm("llama-untied")
    base.save_pretrained(tmp_path / "base")

    def lean(**options: Any) -> Any:
        return with_rows(type(base).from_pretrained(tmp_path / "base"), shrunk=True, **options)

    norm, embedded, few_rows = lean(), lean(target_modules=["q_proj", "embed_tokens"]), lean()
    whole = lean(modules_to_save=["embed_tokens"])
    another = get_peft_model(lean().unload(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    norm.base_model.model.model.norm.weight.requires_grad_(True)
    other = small_lm("llama-untied")
    other.get_input_embeddings().weight.data += 1
    other.save_pretrained(tmp_path / "other")
    smaller = small_lm("llama-untied")
    smaller.resize_token_embeddings(FULL_SIZE - 10)
    smaller.save_pretrained(tmp_path / "smaller")
    for model, folder, error, words in (
        (norm, "base", ModelError, r"1 other parameters train, the first of them .*model\.norm\.weight"),
        (embedded, "base", ModelError, r"model\.embed_tokens has an adapter of its own"),
        (whole, "base", ModelError, r"model\.embed_tokens has an adapter of its own"),
        (another, "base", ModelError, r"one adapter with LoRA .* active are: IA3\. .*model\.save_pretrained"),
        (few_rows, "other", ModelError, r"rows outside the vocabulary differ from those of"),
        (
            few_rows,
            "smaller",
            CheckpointError,
            r"expected 500 rows, found 490; if tokens were added, save the resized model",
        ),
    ):
        with pytest.raises(error, match=words):
            export_trainable_tokens(model, tmp_path / "adapter", base=tmp_path / folder)
        assert not (tmp_path / "adapter").exists()


def test_an_adapter_beside_which_no_rows_train_is_refused(tmp_path: Path) -> None:
    small_lm("llama-tied").save_pretrained(tmp_path / "base")
    lean = lv.shrink_(type(small_lm("llama-tied")).from_pretrained(tmp_path / "base"), NEW, on_missing="frozen")
    with pytest.raises(ModelError, match=r"model\.embed_tokens: its rows do not train.*weight\.requires_grad_\(True\)"):
        export_trainable_tokens(quietly_adapted(copy.deepcopy(lean)), tmp_path / "adapter")


def test_new_rows_train_beside_qlora_and_go_into_its_adapter(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from peft import prepare_model_for_kbit_training

    lean = lv.shrink_(quantized(tmp_path, "llama-tied"), NEW, on_missing="frozen")
    lean = quietly_adapted(prepare_model_for_kbit_training(lean, use_gradient_checkpointing=False))
    rows = lean.get_input_embeddings().weight.requires_grad_(True)
    before = rows.detach().clone()
    optimizer = torch.optim.SGD([each for each in lean.parameters() if each.requires_grad], lr=0.05, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        lean(**inputs()).loss.backward()
        optimizer.step()
    assert rows.shape == rows.grad.shape == optimizer.state[rows]["momentum_buffer"].shape == (10, 64)
    assert not torch.equal(rows, before)
    export_trainable_tokens(lean, tmp_path / "adapter", base=tmp_path / "base")
    exported = read_all(tmp_path / "adapter")[
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]
    assert torch.equal(exported, rows)
    full = prepare_model_for_kbit_training(quantized(tmp_path, "llama-tied"), use_gradient_checkpointing=False)
    adapted = loaded(full, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(
            adapted(**inputs()).logits, lean.eval()(**inputs()).logits.clone(), rtol=1e-2, atol=1e-2
        )
