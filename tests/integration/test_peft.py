"""LoRA, modules_to_save and LoRA on the embedding itself, with shrinking before and after."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import differing, train
from models import FULL_SIZE, PAD, batch, small_lm, small_model, used_vocabulary
from peft import LoraConfig, PeftModel, PromptTuningConfig, TrainableTokensConfig, get_peft_model
from torch import nn

from leanvocab.errors import BypassError, TiedOutputError
from leanvocab.model.shrink import merge_, shrink_
from leanvocab.model.status import status
from leanvocab.output.layer import RemapLinear
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

CONFIGS: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": ["q_proj", "v_proj"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",  # peft says so whenever an embedding is targeted
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",  # peft 0.21 reads a name that transformers 5.23 has deprecated
)


def adapted(name: str, order: str | None) -> nn.Module:
    """A LoRA model; shrunk "before" or "after" the adapter is put on, or not at all."""
    model = small_model("llama")
    if order == "before":
        shrink_(model, used_vocabulary())
    torch.manual_seed(3)
    wrapped: nn.Module = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", lora_dropout=0.1, **CONFIGS[name]))  # type: ignore[arg-type]
    if order == "after":
        shrink_(wrapped, used_vocabulary())
    return wrapped


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_trains_saves_and_merges_as_on_the_unshrunk_model(name: str, order: str, tmp_path: Path) -> None:
    full, model = adapted(name, None), adapted(name, order)
    assert train(full)[0] == train(model)[0]
    assert differing(full, model) == []
    for each, folder in ((full, "full"), (model, "shrunk")):
        each.save_pretrained(tmp_path / folder)
        for path in (tmp_path / "full").iterdir():
            assert path.name == "README.md" or path.read_bytes() == (tmp_path / folder / path.name).read_bytes()
    merge_(model)
    assert differing(full, model) == []
    assert differing(full.merge_and_unload(), model.merge_and_unload()) == []
    assert not status(model)


@pytest.mark.parametrize("order", ["before", "after"])
def test_the_adapter_of_a_shrunk_model_loads_on_the_full_base(order: str, tmp_path: Path) -> None:
    model = adapted("modules_to_save", order)
    train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small_model("llama"), tmp_path)
    assert torch.equal(loaded.eval()(**batch()).logits, model.eval()(**batch()).logits)


@pytest.mark.parametrize("order", ["before", "after"])
def test_merging_lora_into_a_partial_embedding_is_refused_by_name_and_works_after_merging_the_table(order: str) -> None:
    full, model = adapted("LoRA on the embedding", None), adapted("LoRA on the embedding", order)
    train(full), train(model)
    with pytest.raises(
        BypassError, match=r"an adapter on a partial vocabulary matrix cannot be merged into it.*merge_\(model\) first"
    ):
        model.merge_and_unload()
    merge_(model)
    assert differing(full.merge_and_unload(), model.merge_and_unload()) == []


TOKENS = [30, 5, 3]  # in no order, and among them one that the data do not use
TOKEN_ADAPTERS: dict[str, Any] = {
    "trainable tokens": TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed_tokens"]),
    "trainable tokens with padding": TrainableTokensConfig(token_indices=[PAD, 7, 3], target_modules=["embed_tokens"]),
    "LoRA with trainable tokens": LoraConfig(
        task_type="SEQ_CLS", target_modules=["q_proj"], trainable_token_indices={"embed_tokens": TOKENS}
    ),
}


@pytest.mark.parametrize("name", TOKEN_ADAPTERS)
def test_trainable_tokens_train_save_and_merge_as_on_the_unshrunk_model(name: str, tmp_path: Path) -> None:
    full, model = (get_peft_model(small_model("llama"), copy.deepcopy(TOKEN_ADAPTERS[name])) for _ in range(2))
    shrink_(model, PartialVocabulary(sorted({*used_vocabulary()} - {5}), FULL_SIZE))  # the adapter has a row of its own
    assert train(full)[0] == train(model)[0]
    assert differing(full, model) == []
    full.eval(), model.eval()
    assert torch.equal(full(**batch()).logits, model(**batch()).logits)
    with full.disable_adapter(), model.disable_adapter():
        assert torch.equal(full(**batch()).logits, model(**batch()).logits)
    for each, folder in ((full, "full"), (model, "shrunk")):
        each.save_pretrained(tmp_path / folder)
    for path in (tmp_path / "full").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "shrunk" / path.name).read_bytes()
    with pytest.raises(BypassError, match=r"cannot be merged into it.*merge_\(model\) first"):
        model.merge_and_unload()
    assert differing(full.merge_and_unload(), merge_(model).merge_and_unload()) == []


def test_trainable_tokens_around_a_matrix_that_the_output_layer_holds_are_refused_by_name() -> None:
    model = wrapped(small_lm("llama-tied"), target_modules=["q_proj"], trainable_token_indices=[3, 5])
    with pytest.raises(BypassError, match=r"trainable tokens\) writes its rows over those of a matrix that the output"):
        shrink_(model, used_vocabulary())


def test_trainable_tokens_on_a_shrunk_table_are_refused_by_name_with_ids_below_the_partial_size() -> None:
    model = shrink_(small_model("llama"), used_vocabulary())
    low = [3, 5, 30]
    assert max(low) < len(used_vocabulary())
    wrapped = get_peft_model(model, TrainableTokensConfig(token_indices=low, target_modules=["embed_tokens"]))
    with pytest.raises(
        BypassError, match=r"TrainableTokensLayer .* was put on a table that is partial already.*shrink after it"
    ):
        wrapped(**batch())


def test_an_adapter_that_is_put_on_after_a_forward_passed_is_watched_again() -> None:
    model = shrink_(small_model("llama"), used_vocabulary())
    for training in (True, False):
        model.train(training)(**batch())
    wrapped = get_peft_model(model, TrainableTokensConfig(token_indices=[3, 5, 30], target_modules=["embed_tokens"]))
    for training in (True, False):
        with pytest.raises(BypassError):
            wrapped.train(training)(**batch())


def wrapped(model: nn.Module, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of ties in words of its own
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))  # type: ignore[arg-type]


def test_a_tied_model_under_lora_is_shrunk_as_it_is_without() -> None:
    model = wrapped(small_model("llama-untied", tie_word_embeddings=True), target_modules=["q_proj"])
    assert status(shrink_(model, used_vocabulary())).output == "frozen"
    with pytest.raises(TiedOutputError):
        shrink_(merge_(model), used_vocabulary(), output="full")


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
)
def test_an_output_layer_is_found_within_an_adapter_with_every_copy_that_trains(options: dict[str, Any]) -> None:
    model = wrapped(small_model("llama-untied", tie_word_embeddings=False), **options)
    shrink_(model, used_vocabulary(), output="frozen")
    layers = [each for each in model.get_output_embeddings().modules() if isinstance(each, RemapLinear)]
    assert len(layers) == 1 + ("modules_to_save" in options)
    assert all(each.weight.shape == (len(used_vocabulary()), 48) for each in layers)
    merge_(model)
    assert not status(model)


def test_prompt_tuning_finds_the_table_of_a_model_that_is_shrunk_already() -> None:
    model = shrink_(small_model("llama"), used_vocabulary())
    prompted = get_peft_model(model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    assert prompted.word_embeddings is model.get_input_embeddings()
    merge_(model)
    assert not hasattr(model.get_input_embeddings().weight, "ds_shape")  # what says that a parameter is held in part
