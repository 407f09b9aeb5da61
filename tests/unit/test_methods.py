"""Methods of a transformers model that know of the partial vocabulary while it is shrunk."""

from pathlib import Path
from typing import Any

import torch
from comparing import train
from models import batch, small_model, twins, used_vocabulary
from safetensors.torch import load_file

from leanvocab.model.shrink import merge_, partial_state_dicts, shrink_


def test_a_state_dict_with_partial_rows_is_saved_in_full(tmp_path: Path) -> None:
    """DeepSpeed's ZeRO-3 gathers one around the hooks that make state dicts full, and the Trainer hands it over to be saved."""
    full, model = twins()
    shrink_(model, used_vocabulary())
    for each in (full, model):
        train(each)
    with partial_state_dicts(model):
        partial = dict(model.state_dict())
    rows = partial["roberta.embeddings.word_embeddings.weight"]
    assert len(rows) == len(used_vocabulary())
    full.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "lean", state_dict=partial)
    assert partial["roberta.embeddings.word_embeddings.weight"] is rows  # the caller's own is as it was
    assert (tmp_path / "full" / "model.safetensors").read_bytes() == (
        tmp_path / "lean" / "model.safetensors"
    ).read_bytes()


def test_a_state_dict_of_a_part_of_the_model_is_saved_as_it_is(tmp_path: Path) -> None:
    model = shrink_(small_model(), used_vocabulary())
    head = {name: value for name, value in model.state_dict().items() if name.startswith("classifier")}
    model.save_pretrained(tmp_path, state_dict=head)
    assert load_file(tmp_path / "model.safetensors").keys() == head.keys()


def test_the_methods_are_those_of_the_class_again_after_merging() -> None:
    model: Any = shrink_(small_model(), used_vocabulary())
    own = {"save_pretrained", "num_parameters", "resize_token_embeddings"}
    assert own <= model.__dict__.keys()
    merge_(model)
    assert not own & model.__dict__.keys()
    with torch.no_grad():
        model(**batch())
