"""The output layer over a partial vocabulary: what it holds, refuses, shares and gives back."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import FULL_SIZE, small_gemma3n, small_lm
from references import KEPT, lm_batch, lm_vocabulary, mask_gradients, token_loss
from torch import Tensor, nn
from transformers.trainer_pt_utils import LabelSmoother

from leanvocab.errors import (
    BypassError,
    LeanVocabWarning,
    MissingTokenError,
    ModelError,
    OptimizerError,
    VocabularyError,
)
from leanvocab.model.shrink import merge_, shrink_, shrunk
from leanvocab.model.status import status
from leanvocab.output.frozen_rows import FrozenRows
from leanvocab.output.layer import RemapLinear
from leanvocab.output.projection import MappedRows
from leanvocab.reports.inventory import take_inventory
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

OUTSIDE = next(token_id for token_id in range(3, FULL_SIZE) if token_id not in lm_vocabulary())


def shrunk_lm(name: str = "llama-tied", output: Any = "frozen", **options: Any) -> Any:
    model = small_lm(name)
    if output != "restricted":
        return shrink_(model, lm_vocabulary(), output=output, **options)
    with pytest.warns(LeanVocabWarning, match="another objective"):
        return shrink_(model, lm_vocabulary(), output=output, **options)


def test_restricting_is_said_aloud() -> None:
    expected = r'output="restricted" trains a softmax over 63 of 500 tokens \(lm_head\), which is another objective'
    with pytest.warns(LeanVocabWarning, match=expected):
        shrink_(small_lm("llama-tied"), lm_vocabulary(), output="restricted")


@pytest.mark.parametrize(("name", "mode"), [("llama-tied", "frozen"), ("llama-untied", "full"), ("t5-tied", "frozen")])
def test_without_a_mode_tied_layers_are_frozen_and_untied_ones_stay_full(name: str, mode: str) -> None:
    assert status(shrink_(small_lm(name), lm_vocabulary())).output == mode


def test_a_tied_matrix_is_one_parameter_throughout() -> None:
    model = small_lm("t5-tied")
    modules = [model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens, model.lm_head]
    with shrunk(model, lm_vocabulary()):
        assert len({id(module.weight) for module in modules}) == 1
        assert model.lm_head.weight.shape == (63, 32)
        assert model.lm_head.out_features == FULL_SIZE
        table = status(model).tables[0]
        assert (table.output, len(status(model).tables)) == ("frozen", 1)
        assert set(table.paths) == {"shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}
        copied = copy.deepcopy(model)
        assert copied.lm_head.weight is copied.shared.weight
        assert copied.lm_head.weight is not model.lm_head.weight
    assert len({id(module.weight) for module in modules}) == 1
    assert model.lm_head.weight.shape == (FULL_SIZE, 32)
    assert type(model.lm_head) is nn.Linear


def test_an_untied_output_layer_is_a_matrix_of_its_own() -> None:
    model = shrunk_lm("llama-untied")
    assert [(table.paths, table.output) for table in status(model).tables] == [
        (("model.embed_tokens",), None),
        (("lm_head",), "frozen"),
    ]
    assert model.num_parameters() == small_lm("llama-untied").num_parameters()
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()}["lm_head.weight"] == (FULL_SIZE, 32)


def test_each_side_may_have_a_vocabulary_of_its_own() -> None:
    outputs = PartialVocabulary(range(0, FULL_SIZE, 5), FULL_SIZE)
    model = shrink_(
        small_lm("llama-untied"), {"model.embed_tokens": lm_vocabulary(), "lm_head": outputs}, output="frozen"
    )
    assert [table.num_rows for table in status(model).tables] == [63, 100]


class Heads(nn.Module):
    """More rows in the table than scores, as models have whose image ids are only read."""

    def __init__(self, scores: int = 280) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(FULL_SIZE, 8), nn.Linear(8, scores)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.table(input_ids))  # type: ignore[no-any-return]


def test_an_output_layer_of_fewer_scores_takes_the_ids_that_it_scores() -> None:
    model = shrink_(Heads(), lm_vocabulary(), output="frozen")
    assert [table.full_size for table in status(model).tables] == [FULL_SIZE, 280]
    assert model.head.table.token_ids.tolist() == [int(i) for i in lm_vocabulary().token_ids if i < 280]
    assert model(torch.tensor([[int(KEPT[0])]])).shape == (1, 1, 280)


def test_an_output_layer_of_more_scores_needs_a_vocabulary_of_its_own() -> None:
    with pytest.raises(VocabularyError, match="head scores 600 tokens, and no vocabulary of that size was given"):
        shrink_(Heads(600), lm_vocabulary(), output="frozen")


class OwnHead(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, F.normalize(self.weight), self.bias)


def test_a_layer_that_multiplies_by_itself_is_refused_by_name() -> None:
    model = Heads()
    model.head = OwnHead(8, FULL_SIZE)
    with pytest.raises(BypassError, match=r"head: OwnHead\.forward multiplies by the weight itself"):
        shrink_(model, lm_vocabulary(), output="frozen")
    assert status(shrink_(model, lm_vocabulary())).output == "full"


class OtherLoss(Heads):
    """A loss that does not come from calling the output layer."""

    def __init__(self, reads_weight: bool) -> None:
        super().__init__(FULL_SIZE)
        self.reads_weight = reads_weight

    def forward(self, input_ids: Tensor) -> Any:
        class Output(dict):  # type: ignore[type-arg]
            hidden = self.table(input_ids)
            loss = (hidden @ self.head.weight.t() if self.reads_weight else hidden).sum()

        return Output()


def test_a_fused_loss_that_goes_around_the_output_layer_is_refused() -> None:
    ids = torch.tensor([[int(KEPT[0])]])
    with pytest.raises(BypassError, match=r"OtherLoss\.forward calls t on the weight of head itself"):
        shrink_(OtherLoss(True), lm_vocabulary(), output="frozen")(ids)
    with pytest.raises(
        BypassError, match="OtherLoss gave a loss without calling its output layer head, as fused losses"
    ):
        shrink_(OtherLoss(False), lm_vocabulary(), output="frozen")(ids)


def test_a_label_outside_a_restricted_vocabulary_is_an_error_in_training_and_infinite_in_evaluation() -> None:
    model = shrunk_lm(output="restricted")
    batch = lm_batch()
    batch["labels"][1, 3] = OUTSIDE
    with pytest.raises(
        MissingTokenError, match=rf"id {OUTSIDE} at flat position 12 of the labels is outside the partial"
    ):
        model.train()(**batch)
    with pytest.warns(LeanVocabWarning, match="1 labels are outside the partial vocabulary"):
        assert model.eval()(**batch).loss == torch.inf


def test_a_label_outside_the_vocabulary_is_scored_by_its_frozen_row() -> None:
    full = small_lm("llama-tied")
    model = shrunk_lm()
    batch = lm_batch()
    batch["labels"][1, 3] = OUTSIDE
    torch.testing.assert_close(model(**batch).loss, full(**batch).loss)


def test_rows_that_are_frozen_do_not_decay() -> None:
    model = small_lm("llama-tied")
    before = copy.deepcopy(model.state_dict())
    shrink_(model, lm_vocabulary(), decay_unused_rows=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(**lm_batch()).loss.backward()
    optimizer.step()
    merge_(model)
    moved = (model.lm_head.weight != before["lm_head.weight"]).any(1).nonzero()[:, 0]
    assert set(moved.tolist()) == set(lm_vocabulary())


@pytest.mark.parametrize("output", ["frozen", "restricted"])
@pytest.mark.parametrize("label", [-1, FULL_SIZE])
def test_a_label_that_is_no_token_is_an_error_in_every_mode(output: Any, label: int) -> None:
    model = shrunk_lm(output=output)
    batch = lm_batch()
    batch["labels"][1, 3] = label
    expected = rf"embed_tokens: label {label} at flat position .* is no token id: expected 0 … {FULL_SIZE - 1}, or -100"
    with pytest.raises(IndexError, match=expected):
        model(**batch)


def test_rows_that_were_taken_away_after_the_forward_are_an_error_by_name() -> None:
    model = shrunk_lm()
    logits = model(input_ids=lm_batch()["input_ids"]).logits
    model.lm_head.weight.untyped_storage().resize_(0)  # as ZeRO-3 and FSDP2 do
    with pytest.raises(BypassError, match=r"its rows were taken away after its forward.*output=\"full\""):
        token_loss(logits, lm_batch()["labels"])


def test_labels_are_found_where_single_parameters_were_moved() -> None:
    """FSDP moves parameters one by one, and nothing tells the module."""
    model = shrunk_lm(output="restricted")
    model.lm_head._ids = model.lm_head._ids.to("meta")
    assert model(**lm_batch()).loss.isfinite()


def test_no_gradient_is_computed_that_nobody_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    original = MappedRows.backproject

    def backproject(
        self: MappedRows, gradient: Tensor, hidden: Tensor | None, weight: Tensor, choose: Any = None
    ) -> Any:
        asked.append(hidden is not None)
        return original(self, gradient, hidden, weight)

    monkeypatch.setattr(MappedRows, "backproject", backproject)
    model = shrunk_lm()
    with torch.no_grad():
        model(**lm_batch())
    assert asked == []
    model(**lm_batch()).loss.backward()
    assert set(asked) == {True}
    asked.clear()
    model.lm_head.weight.requires_grad_(False)  # as under LoRA
    model(**lm_batch()).loss.backward()
    assert set(asked) == {False}


def test_partial_ids_are_refused_where_the_output_side_is_partial() -> None:
    with pytest.raises(
        ModelError, match='output="frozen" takes labels and gives logits in full ids, and ids="partial"'
    ):
        shrink_(small_lm("llama-tied"), lm_vocabulary(), ids="partial")


def test_a_module_that_scores_nothing_has_no_output_mode() -> None:
    with pytest.raises(ModelError, match="has no output layer over the vocabulary"):
        shrink_(nn.Sequential(nn.Embedding(FULL_SIZE, 4)), lm_vocabulary(), output="frozen", embedding="0")


def test_a_sharded_matrix_is_refused_with_the_order_that_works() -> None:
    model = small_lm("llama-tied")
    model.lm_head.weight.full_tensor = lambda: None  # as sharded tensors have
    with pytest.raises(
        ModelError, match=r"model.embed_tokens: its weight is sharded .* shrink the model before sharding"
    ):
        shrink_(model, lm_vocabulary())


def test_an_optimizer_that_exists_is_handed_over_with_its_states() -> None:
    full, lean = small_lm("llama-tied"), small_lm("llama-tied")
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0) for model in (full, lean)]
    for model, optimizer in zip((full, lean), optimizers, strict=True):
        model(**lm_batch()).loss.backward()
        mask_gradients(model, lm_vocabulary())
        optimizer.step()
        optimizer.zero_grad()
    shrink_(lean, lm_vocabulary(), optimizer=optimizers[1])
    for model, optimizer in zip((full, lean), optimizers, strict=True):
        model(**lm_batch(1)).loss.backward()
        mask_gradients(full, lm_vocabulary())
        optimizer.step()
    merge_(lean, optimizer=optimizers[1])
    # Adam divides by the size of a gradient, and so gives the rounding of small ones the weight of large ones.
    for first, second in zip(full.parameters(), lean.parameters(), strict=True):
        assert float((first - second).abs().detach().max()) <= 2e-4


def test_states_of_rows_that_ordinary_training_moved_are_not_dropped() -> None:
    model = small_lm("llama-tied")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    model(**lm_batch()).loss.backward()  # the softmax moves every row
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(OptimizerError, match="ordinary training would go on moving those rows"):
        shrink_(model, lm_vocabulary(), optimizer=optimizer)


@pytest.mark.parametrize("output", ["frozen", "restricted"])
def test_a_pickled_and_a_copied_model_go_on_as_the_first(output: str) -> None:
    model = shrunk_lm(output=output)
    loss = model(**lm_batch()).loss
    loss.backward()
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert isinstance(other.lm_head, RemapLinear)
        assert torch.equal(other(**lm_batch()).loss, loss)
        assert torch.equal(merge_(other).lm_head.weight, copy.deepcopy(model).state_dict()["lm_head.weight"])


def test_frozen_rows_on_the_host_are_never_brought_to_the_device_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanvocab.output.projection.STREAMED_BYTES", 77 * 32 * 4)
    full, model = small_lm("llama-tied"), shrunk_lm(frozen_rows="host")
    monkeypatch.setattr(FrozenRows, "whole", None)
    for each in (full, model):
        output = each(**lm_batch())
        (output.loss + output.logits.log_softmax(-1)[..., 5].sum()).backward()
    kept = torch.tensor(lm_vocabulary().token_ids)
    torch.testing.assert_close(model.lm_head.weight.grad, full.lm_head.weight.grad[kept], rtol=1e-4, atol=1e-5)


def test_a_cast_model_scores_in_its_new_dtype() -> None:
    full, model = small_lm("llama-tied"), shrunk_lm()
    expected, found = full.bfloat16()(**lm_batch()), model.bfloat16()(**lm_batch())
    assert found.logits.dtype == expected.logits.dtype == torch.bfloat16
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.logits.clone(), expected.logits, rtol=2e-2, atol=2e-2)


def test_a_model_that_loads_other_rows_scores_with_them() -> None:
    model, other = shrunk_lm(), small_lm("llama-tied")
    model(**lm_batch())
    with torch.no_grad():
        other.lm_head.weight.mul_(-2)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(**lm_batch()).loss, other(**lm_batch()).loss)


def test_the_trainers_label_smoother_gives_the_full_models_loss_and_is_refused_where_it_would_be_infinite() -> None:
    smoother, batch = LabelSmoother(epsilon=0.1), lm_batch()
    inputs, labels = {"input_ids": batch["input_ids"]}, batch["labels"]
    losses = []
    for model in (small_lm("llama-tied"), shrunk_lm()):
        losses.append(smoother(model(**inputs), labels, shift_labels=True))
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    with pytest.raises(ModelError, match=r"label smoothing spreads probability over all tokens.* infinite"):
        smoother(shrunk_lm(output="restricted")(**inputs), labels, shift_labels=True)


def test_the_layer_says_what_it_is() -> None:
    assert "rows=63, output=frozen" in repr(shrunk_lm().lm_head)


class Odd(nn.Module):
    """A language model with a tensor of the vocabulary's size that is neither table nor layer nor bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(FULL_SIZE, 8)
        self.head = nn.Linear(8, FULL_SIZE)
        self.head.weight = self.table.weight
        self.mixing = nn.Parameter(0.1 * torch.randn(FULL_SIZE, 4))

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.table(ids)) + self.mixing[ids].repeat(1, 1, 2)
        return self.head(hidden) + self.mixing.sum(1)  # type: ignore[no-any-return]


def test_a_tensor_that_is_not_understood_stays_whole_and_trains_as_it_did() -> None:
    torch.manual_seed(0)
    full = Odd()
    lean = shrink_(copy.deepcopy(full), lm_vocabulary())
    assert [each.names for each in take_inventory(full).tensors if not each.is_understood] == [("mixing",)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (full, lean)]
    batch = lm_batch()
    for _ in range(3):
        for model in (full, lean):
            token_loss(model(batch["input_ids"]), batch["labels"]).backward()
        mask_gradients(full, lm_vocabulary(), [full.table.weight])
        torch.testing.assert_close(lean.mixing.grad, full.mixing.grad, rtol=1e-5, atol=1e-7)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    saved = lean.state_dict()
    for name, value in full.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-6)


def test_tables_for_each_layer_are_made_partial_where_they_are_named() -> None:
    """Gemma 3n's, whose vocabulary is smaller than that of its input table."""
    torch.manual_seed(0)
    full = transformers.Gemma3nForCausalLM(small_gemma3n())
    lean, size = copy.deepcopy(full), FULL_SIZE - 20
    ids = [each for each in lm_vocabulary() if each < size]
    tables = {"embed_tokens": PartialVocabulary(ids, FULL_SIZE), "embed_tokens_per_layer": PartialVocabulary(ids, size)}
    shrink_(lean, {f"model.{name}": vocabulary for name, vocabulary in tables.items()})
    assert [table.num_rows for table in status(lean).tables] == [len(ids), len(ids)]
    batch = lm_batch(ids=ids)
    for model in (full, lean):
        model(**batch).loss.backward()
    for name in tables:
        expected, found = (model.get_parameter(f"model.{name}.weight").grad for model in (full, lean))
        torch.testing.assert_close(found, expected[torch.tensor(ids)], rtol=1e-4, atol=1e-6)
    for first, second in zip(full.parameters(), merge_(lean).parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("mode", ["frozen", "restricted"])
def test_zero3_is_refused_before_the_first_loss_with_what_to_do(mode: str) -> None:
    """DeepSpeed puts `ds_status` on parameters whose rows it takes away; evaluation is left to it."""
    model = shrunk_lm(output=mode).train()
    model.lm_head.weight.ds_status = "NOT_AVAILABLE"
    expected = rf'output="{mode}" does not train under DeepSpeed\'s ZeRO-3.*train with ZeRO-2 or FSDP2.*output="full"'
    with pytest.raises(BypassError, match=expected):
        model(**lm_batch())
    assert model.eval()(**lm_batch()).loss.isfinite()
