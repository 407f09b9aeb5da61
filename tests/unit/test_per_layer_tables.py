"""Tables for each layer (Gemma 3n, Gemma 4): shrunk with the input table, of a size of their own, and whole again everywhere."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from comparing import differing
from models import FULL_SIZE, small_gemma3n
from torch import Tensor

import leanvocab as lv
from leanvocab.errors import AlreadyShrunkError, ModelError
from leanvocab.model.status import check_shrunk_as
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

SIZE = FULL_SIZE - 20  # rows of Gemma 3n's tables for each layer
INPUT, PER_LAYER = "model.embed_tokens", "model.embed_tokens_per_layer"
BEYOND = SIZE + 7  # an id that the table for each layer has no row for
IDS = [2, *range(9, 31), BEYOND]
VOCABULARY = PartialVocabulary(IDS, FULL_SIZE)


def gemma3n() -> Any:
    torch.manual_seed(0)
    config = small_gemma3n()
    config.tie_word_embeddings = False
    return transformers.Gemma3nForCausalLM(config).train()


def batch() -> dict[str, Tensor]:
    """Rows of ids, one of them beyond the table for each layer; skips where the text model takes none."""
    ids = torch.tensor(IDS)[torch.randint(0, len(IDS), (4, 9), generator=torch.Generator().manual_seed(1))]
    ids[0, 3] = BEYOND
    if not takes_ids_beyond():
        pytest.skip("Gemma 3n as a text model takes no ids beyond its tables for layers in this transformers")
    return {"input_ids": ids, "labels": ids}


@functools.cache
def takes_ids_beyond() -> bool:
    try:
        gemma3n()(input_ids=torch.tensor([[BEYOND]]))
    except IndexError:
        return False
    return True


def train(model: Any, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_table_for_each_layer_keeps_its_own_ids_and_the_zero_that_stands_for_those_beyond_it() -> None:
    lean = lv.shrink_(gemma3n(), VOCABULARY)
    tables = {table.paths[0]: table for table in lv.status(lean).tables}
    assert (tables[INPUT].num_rows, tables[INPUT].full_size) == (len(IDS), FULL_SIZE)
    assert (tables[PER_LAYER].num_rows, tables[PER_LAYER].full_size) == (len(IDS), SIZE)  # one less, and the zero
    kept = lean.get_submodule(PER_LAYER).table.vocabulary
    assert kept == PartialVocabulary([0, *IDS[:-1]], SIZE)


def test_without_ids_beyond_it_nothing_is_added() -> None:
    lean = lv.shrink_(gemma3n(), PartialVocabulary(IDS[:-1], FULL_SIZE))
    assert lean.get_submodule(PER_LAYER).table.vocabulary == PartialVocabulary(IDS[:-1], SIZE)


def test_it_trains_saves_and_merges_as_the_full_model_does(tmp_path: Path) -> None:
    full = gemma3n()
    lean = lv.shrink_(copy.deepcopy(full), VOCABULARY)
    assert train(full) == train(lean)
    assert differing(full.state_dict(), lean.state_dict()) == []
    for name, model in (("full", full), ("lean", lean)):
        model.save_pretrained(tmp_path / name)
    assert (tmp_path / "full/model.safetensors").read_bytes() == (tmp_path / "lean/model.safetensors").read_bytes()
    assert differing(full.state_dict(), lv.merge_(lean).state_dict()) == []


def test_a_delta_holds_the_rows_of_each_and_merges_into_the_full_files(tmp_path: Path) -> None:
    full = gemma3n()
    full.save_pretrained(tmp_path / "base")
    lean = lv.shrink_(copy.deepcopy(full), VOCABULARY)
    train(full), train(lean)
    lv.save_delta(lean, tmp_path / "delta", base=tmp_path / "base")
    lv.merge_checkpoint(delta=tmp_path / "delta", base=tmp_path / "base", output=tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert differing(full.state_dict(), merged.state_dict()) == []


def test_a_mapping_leaves_whole_what_it_does_not_name() -> None:
    lean = lv.shrink_(gemma3n(), {INPUT: VOCABULARY})
    assert [table.paths for table in lv.status(lean).tables] == [(INPUT,)]


def test_what_is_asked_for_is_compared_with_each_table() -> None:
    lean = lv.shrink_(gemma3n(), VOCABULARY)
    check_shrunk_as(lean, VOCABULARY, {})
    with pytest.raises(AlreadyShrunkError, match=rf"{INPUT} has 24 rows.*{PER_LAYER} has 24 rows"):
        check_shrunk_as(lean, PartialVocabulary([1, 2, 3], FULL_SIZE), {})


def test_partial_ids_are_refused_where_one_would_be_two_tokens() -> None:
    with pytest.raises(ModelError, match=rf'{PER_LAYER} is given the ids of {INPUT}.*leave ids="full"'):
        lv.shrink_(gemma3n(), VOCABULARY, ids="partial", output="full")


def test_an_estimate_counts_the_rows_of_each() -> None:
    estimate = lv.estimate_memory(gemma3n(), VOCABULARY)
    assert {table.path: (table.full_rows, table.partial_rows) for table in estimate.tables} == {
        INPUT: (FULL_SIZE, len(IDS)),
        PER_LAYER: (SIZE, len(IDS)),
    }


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning"  # peft 0.21 reads a name that transformers 5.23 has deprecated
)
def test_adapters_train_beside_both_tables() -> None:
    peft = pytest.importorskip("peft")
    full = gemma3n()
    lean = lv.shrink_(copy.deepcopy(full), VOCABULARY)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=True)
    losses = []
    for model in (full, lean):
        torch.manual_seed(3)
        losses.append(train(peft.get_peft_model(model, config)))
    assert losses[0] == losses[1]


@pytest.mark.skipif(
    not hasattr(transformers, "Gemma4ForConditionalGeneration"), reason="transformers has no Gemma 4 yet"
)
def test_gemma_4_reads_the_row_of_the_pad_token_and_generates_the_same() -> None:
    text = {
        "vocab_size": FULL_SIZE, "vocab_size_per_layer_input": FULL_SIZE, "hidden_size": 16, "hidden_size_per_layer_input": 8,
        "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "global_head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    placeholders = {"image_token_id": 490, "video_token_id": 491, "audio_token_id": 492, "tie_word_embeddings": False}
    torch.manual_seed(0)
    full = transformers.Gemma4ForConditionalGeneration(
        transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **placeholders)
    ).train()
    vocabulary = PartialVocabulary.from_counts(lv.count_tokens({"input_ids": [IDS]}), model=full)
    assert {490, 491, 492, 0} <= set(vocabulary)
    lean = lv.shrink_(copy.deepcopy(full), vocabulary)
    assert len(lv.status(lean).tables) == 2
    assert train(full) == train(lean)
    prompt = batch()["input_ids"][:1]
    generated = [model.eval().generate(prompt, max_new_tokens=6, do_sample=False) for model in (full, lean)]
    assert torch.equal(*generated)
    assert differing(full.state_dict(), lv.merge_(lean).state_dict()) == []
