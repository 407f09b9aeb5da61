import copy
import io
from pathlib import Path

import pytest
import torch
from comparing import bits, differing, train
from models import FULL_SIZE, small_model, twins, unseen_ids, used_vocabulary
from safetensors.torch import load_file
from torch import nn

from leanvocab.errors import CheckpointError
from leanvocab.model.shrink import merge_, partial_state_dicts, shrink_
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

KEY = "roberta.embeddings.word_embeddings.weight"


def test_a_saved_state_dict_has_the_bytes_of_the_unshrunk_models() -> None:
    full, model = twins("bart")
    shrink_(model, used_vocabulary())
    train(full)
    train(model)
    saved = []
    for each in (full, model):
        buffer = io.BytesIO()
        torch.save(each.state_dict(), buffer)
        saved.append(buffer.getvalue())
    assert saved[0] == saved[1]


@pytest.mark.parametrize("family", ["roberta", "bart", "llama"])
@pytest.mark.parametrize("size", ["5GB", "40KB"])
def test_save_pretrained_writes_the_files_of_the_unshrunk_model(tmp_path: Path, family: str, size: str) -> None:
    full, model = twins(family)
    shrink_(model, used_vocabulary())
    for each, name in ((full, "full"), (model, "shrunk")):
        train(each)
        each.save_pretrained(tmp_path / name, max_shard_size=size)
    files = sorted(path.name for path in (tmp_path / "full").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "shrunk").iterdir())
    for name in files:
        assert (tmp_path / "full" / name).read_bytes() == (tmp_path / "shrunk" / name).read_bytes()
    again = type(full).from_pretrained(tmp_path / "shrunk")
    assert differing(full, again) == []


def test_variables_are_kept_where_the_caller_asks_for_them() -> None:
    full, model = twins()
    shrink_(model, used_vocabulary())
    value = model.state_dict(keep_vars=True)[KEY]
    assert isinstance(value, nn.Parameter)
    assert bits(value) == bits(full.state_dict()[KEY])


def test_a_state_dict_with_a_prefix_is_full_too() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = shrink_(small_model(), used_vocabulary())

    assert Wrapped().state_dict()[f"inner.{KEY}"].shape == (FULL_SIZE, 48)
    assert small_model().state_dict(prefix="a.").keys() == Wrapped().inner.state_dict(prefix="a.").keys()


def test_an_earlier_state_dict_does_not_change_when_training_goes_on() -> None:
    model = shrink_(small_model(), used_vocabulary())
    early = model.state_dict()[KEY]
    before = bits(early)
    train(model)
    assert bits(model.state_dict()[KEY]) != before
    assert bits(early) == before


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_full_state_dict_takes_the_kept_rows_and_leaves_the_callers_alone(assign: bool) -> None:
    trained, _ = twins()
    train(trained)
    state = trained.state_dict()
    keys, shape = list(state), state[KEY].shape
    model = shrink_(small_model(), used_vocabulary())
    assert not any(model.load_state_dict(state, assign=assign))
    assert (list(state), state[KEY].shape) == (keys, shape)
    assert differing(trained, model) == []
    assert differing(trained, merge_(model)) == []


def test_loading_other_rows_outside_the_vocabulary_makes_them_the_models_rows() -> None:
    torch.manual_seed(3)
    other = small_model(initializer_range=0.5)
    model = shrink_(small_model(), used_vocabulary())
    model.load_state_dict(other.state_dict())
    assert differing(other, model) == []
    with pytest.warns(UserWarning, match="served from the base"):
        assert torch.equal(model.eval()(unseen_ids()).logits, other.eval()(unseen_ids()).logits)


def test_loading_from_a_mapped_file_with_other_rows_maps_that_file_from_then_on(tmp_path: Path) -> None:
    other = small_model(initializer_range=0.5)
    other.save_pretrained(tmp_path)
    model = shrink_(small_model(), used_vocabulary())
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert not model.get_submodule(KEY[: -len(".weight")]).table.store.temporary
    (tmp_path / "model.safetensors").unlink()
    assert differing(other, model) == []


def test_a_state_dict_of_another_dtype_is_rounded_as_ordinary_loading_does() -> None:
    other = small_model(initializer_range=0.5).to(torch.float64)
    full, model = twins()
    shrink_(model, used_vocabulary())
    for each in (full, model):
        each.load_state_dict(other.state_dict())
    assert differing(full, model) == []


def test_a_partial_state_dict_goes_back_in_and_carries_the_digest() -> None:
    full, model = twins()
    shrink_(model, used_vocabulary())
    with partial_state_dicts(model):
        early = copy.deepcopy(model.state_dict())
    assert early[KEY].shape[0] == len(used_vocabulary())
    train(model)
    model.load_state_dict(early)
    assert differing(full, model) == []


def test_a_partial_state_dict_of_another_vocabulary_of_the_same_length_is_refused() -> None:
    """Trap: two id maps of the same length and other content make silent corruption."""
    vocabulary = used_vocabulary()
    ids = vocabulary.token_ids.tolist()
    unseen = int(unseen_ids()[0, 0])
    other = PartialVocabulary(sorted([*ids[:-1], unseen]), FULL_SIZE)
    assert len(other) == len(vocabulary)
    first, second = shrink_(small_model(), vocabulary), shrink_(small_model(), other)
    with partial_state_dicts(first):
        state = first.state_dict()
    with pytest.raises(CheckpointError, match=rf"of another vocabulary: expected digest {other.digest[:16]}…, found"):
        second.load_state_dict(state)
    with partial_state_dicts(second), pytest.raises(CheckpointError, match="of another vocabulary"):
        second.load_state_dict(state)


def test_partial_rows_that_do_not_say_whose_they_are_are_refused_outside_the_context() -> None:
    model = shrink_(small_model(), used_vocabulary())
    with partial_state_dicts(model):
        state = dict(model.state_dict())
    with pytest.raises(
        CheckpointError, match=r"nothing says that they are of this vocabulary.*within partial_state_dicts\(model\)"
    ):
        model.load_state_dict(state)
    with partial_state_dicts(model):
        model.load_state_dict(state)


def test_a_state_dict_of_another_size_is_refused_with_both_sizes() -> None:
    state = small_model(vocab_size=300).state_dict()
    model = shrink_(small_model(), used_vocabulary())
    with pytest.raises(CheckpointError, match=r"expected 500 rows \(the full vocabulary\), found 300"):
        model.load_state_dict(state, strict=False)


def test_a_missing_key_is_reported_as_torch_reports_it() -> None:
    model = shrink_(small_model(), used_vocabulary())
    state = model.state_dict()
    del state[KEY]
    assert model.load_state_dict(state, strict=False).missing_keys == [KEY]


# --- state dicts that DeepSpeed's ZeRO-3 puts together, module by module, around torch's hooks -------------------------


def get_layer_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """DeepSpeed's function of this name, without the gathering; it knows ties by the number of a parameter."""
    state_dict: dict[str, torch.Tensor] = {}
    shared: dict[int, str] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            key = f"{path}.{name}"
            if parameter.ds_id in shared:
                state_dict[key] = state_dict[shared[parameter.ds_id]]
            else:
                state_dict[key] = parameter.detach().cpu()
                shared[parameter.ds_id] = key
    return state_dict


def _numbered(model: nn.Module) -> nn.Module:
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
    return model


@pytest.mark.parametrize("family", ["roberta", "bart", "llama"])
def test_what_zero3_puts_together_is_the_full_model(family: str) -> None:
    full, model = twins(family)
    shrink_(model, used_vocabulary())
    for each in (full, model):
        train(_numbered(each))
    found, expected = get_layer_state_dict(model), get_layer_state_dict(full)
    assert found.keys() == expected.keys()
    assert [name for name in expected if bits(found[name]) != bits(expected[name])] == []
    pointers = [{name: its.data_ptr() for name, its in state.items()} for state in (found, expected)]
    ties = [{(a, b) for a in its for b in its if its[a] == its[b]} for its in pointers]
    assert ties[0] == ties[1]


def test_all_others_and_those_who_ask_for_partial_state_dicts_get_the_partial_parameter() -> None:
    model = _numbered(shrink_(small_model(), used_vocabulary()))
    weight = model.roberta.embeddings.word_embeddings.weight
    assert dict(model.roberta.embeddings.word_embeddings.named_parameters())["weight"] is weight
    assert list(model.roberta.embeddings.word_embeddings.parameters(recurse=False)) == [weight]
    with partial_state_dicts(model):
        assert len(get_layer_state_dict(model)[KEY]) == len(used_vocabulary())
    merge_(model)
    assert len(get_layer_state_dict(_numbered(model))[KEY]) == FULL_SIZE
