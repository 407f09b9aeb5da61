import copy
import io
import pickle
from typing import Any

import pytest
import torch
from comparing import differing, train
from models import FULL_SIZE, PAD, batch, language_batch, small_lm, small_model, twins, unseen_ids, used_vocabulary
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from leanvocab.errors import (
    AlreadyShrunkError,
    BypassError,
    ModelError,
    NotShrunkError,
    TiedOutputError,
    VocabularyError,
)
from leanvocab.model.shrink import merge_, partial_state_dicts, shrink_, shrunk
from leanvocab.model.status import status
from leanvocab.vocabulary.counts import count_tokens
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary
from versions import compiling

TABLE = "roberta.embeddings.word_embeddings"


class Naive(nn.Module):
    """The specification: look up row remap[id] of the kept rows."""

    def __init__(self, full: nn.Embedding, vocabulary: PartialVocabulary):
        super().__init__()
        self.remap = {int(token_id): row for row, token_id in enumerate(vocabulary.token_ids)}
        self.rows = full.weight.detach()[torch.tensor(vocabulary.token_ids)]

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([self.rows[self.remap[i]] for i in ids.flatten().tolist()]).view(*ids.shape, -1)


def test_the_shrunk_lookup_equals_the_naive_one() -> None:
    table, ids = nn.Embedding(9, 4), torch.tensor([[8, 0, 3], [3, 3, 5]])
    vocabulary = PartialVocabulary([0, 3, 5, 8], 9)
    expected = Naive(table, vocabulary)(ids)
    model = nn.Sequential(table)
    shrink_(model, vocabulary, embedding="0")
    assert table.weight.shape == (4, 4)
    assert torch.equal(model(ids), expected)


@pytest.mark.parametrize("family", ["roberta", "bert", "bart", "llama", "llama-untied"])
def test_training_shrunk_and_merging_gives_the_model_of_ordinary_training(family: str) -> None:
    full, model = twins(family)
    inputs = batch()
    if family == "llama-untied":
        inputs["labels"] = inputs["input_ids"].clone()
    expected, _ = train(full, **inputs)
    shrink_(model, used_vocabulary())
    losses, _ = train(model, **inputs)
    assert losses == expected
    assert differing(full, model) == []
    assert merge_(model) is model
    assert differing(full, model) == []
    assert [type(each) for each in model.modules()] == [type(each) for each in full.modules()]
    assert repr(model) == repr(full)


def test_merging_leaves_nothing_of_the_library_on_the_model() -> None:
    full, model = twins()
    merge_(shrink_(model, used_vocabulary()))
    for before, after in zip(full.modules(), model.modules(), strict=True):
        assert before.__dict__.keys() == after.__dict__.keys()
        assert not after._forward_pre_hooks
        assert not after._forward_hooks
        assert not after._state_dict_hooks
        assert not after._load_state_dict_pre_hooks


def test_the_module_keeps_its_identity_attributes_and_full_size() -> None:
    model = small_model()
    table = model.get_submodule(TABLE)
    table.weight.requires_grad_(False)
    shrink_(model, used_vocabulary())
    assert model.get_submodule(TABLE) is table
    assert isinstance(table, nn.Embedding)
    assert (table.num_embeddings, table.embedding_dim, table.padding_idx) == (FULL_SIZE, 48, PAD)
    assert table.weight.shape == (len(used_vocabulary()), 48)
    assert not table.weight.requires_grad
    merge_(model)
    assert not table.weight.requires_grad


def test_tied_tables_of_an_encoder_decoder_stay_tied() -> None:
    model = small_model("bart")
    shrink_(model, used_vocabulary())
    inner = model.model
    assert inner.shared.weight is inner.encoder.embed_tokens.weight is inner.decoder.embed_tokens.weight
    assert len(status(model).tables) == 1
    assert len(status(model).tables[0].paths) == 3
    state = model.state_dict()
    assert state["model.shared.weight"].data_ptr() == state["model.decoder.embed_tokens.weight"].data_ptr()
    merge_(model)
    assert inner.shared.weight is inner.encoder.embed_tokens.weight is inner.decoder.embed_tokens.weight


def test_several_tables_take_a_vocabulary_each() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.source, self.target = nn.Embedding(20, 4), nn.Embedding(30, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.source(ids) + self.target(ids + 9)

    full = Two()
    model, ids = copy.deepcopy(full), torch.tensor([[19, 3]])
    shrink_(model, {"source": PartialVocabulary([3, 19], 20), "target": PartialVocabulary([1, 12, 28], 30)})
    assert torch.equal(model(ids), full(ids))
    assert [table.num_rows for table in status(model).tables] == [2, 3]
    assert differing(full, merge_(model)) == []


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


def test_a_subclass_that_scales_keeps_scaling() -> None:
    table, ids = Scaled(9, 4), torch.tensor([8, 3])
    expected = table(ids)
    model = shrink_(nn.Sequential(table), PartialVocabulary([3, 8], 9))
    assert isinstance(table, Scaled)
    assert torch.equal(model(ids), expected)
    merge_(model)
    assert type(table) is Scaled


@pytest.mark.parametrize(
    "option", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}, {"padding_idx": 8}, {"padding_idx": -6}]
)
def test_options_of_the_embedding_do_in_partial_what_they_do_in_full(option: dict[str, Any]) -> None:
    full = nn.Sequential(nn.Embedding(9, 4, **option), nn.Linear(4, 1))
    model, ids = copy.deepcopy(full), torch.tensor([8, 3, 3, 8, 0])
    shrink_(model, PartialVocabulary([0, 3, 8], 9), embedding="0")
    for each in (full, model):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(3):
            each(ids).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert differing(full, model) == []


def test_a_stale_padding_index_freezes_no_real_row() -> None:
    """The pad id's row stays where it is in the full table; a row of the same position in the partial one trains."""
    table = nn.Embedding(9, 4, padding_idx=1)
    shrink_(nn.Sequential(table), PartialVocabulary([0, 3, 8], 9))
    table(torch.tensor([0, 3, 8])).sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad.eq(1).all()


def test_module_hooks_survive() -> None:
    seen = []
    model = small_model()
    table = model.get_submodule(TABLE)
    table.register_forward_hook(lambda module, args, output: seen.append(args[0].max().item()))
    shrink_(model, used_vocabulary())
    model(**batch())
    merge_(model)
    model(**batch())
    assert seen == [batch()["input_ids"].max().item()] * 2


def test_hooks_on_the_gradient_of_the_weight_survive() -> None:
    model = small_model()
    model.get_submodule(TABLE).weight.register_hook(lambda gradient: gradient * 0)
    shrink_(model, used_vocabulary())
    model(**batch()).loss.backward()
    assert not model.get_submodule(TABLE).weight.grad.any()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_train_on_as_the_model_does_and_merge_by_themselves(copied: Any) -> None:
    full, model = twins()
    shrink_(model, used_vocabulary())
    train(full)
    train(model)
    other = copied(model)
    assert differing(full, other) == []
    train(full)
    train(other)
    assert differing(full, other) == []
    assert differing(full, merge_(other)) == []
    assert status(model)
    assert not status(other)


def test_deep_copies_share_the_store_and_a_copied_table_does_not_drag_the_model_along() -> None:
    model = shrink_(small_model(), used_vocabulary())
    table = model.get_submodule(TABLE)
    copied = copy.deepcopy(table)
    assert copied.table.store is table.table.store
    buffer = io.BytesIO()
    torch.save(copied, buffer)
    whole = io.BytesIO()
    torch.save(model, whole)
    assert len(buffer.getvalue()) < 0.7 * len(whole.getvalue())


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_while_shrunk_rounds_the_unused_rows_as_ordinary_casting_does(cast: torch.dtype) -> None:
    full, model = twins()
    shrink_(model, used_vocabulary())
    for each in (full, model):
        each.to(cast)
    assert differing(full, model) == []
    for each in (full, model):
        each.to(torch.float32)
    assert differing(full, model) == []
    assert differing(full, merge_(model)) == []


def test_a_detour_over_the_meta_device_keeps_the_map() -> None:
    model = shrink_(nn.Sequential(nn.Embedding(9, 4)), PartialVocabulary([3, 8], 9))
    state = model.state_dict()
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict(state)
    assert torch.equal(model(torch.tensor([8])), state["0.weight"][8:9])


@compiling
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_trains_the_same(backend: str) -> None:
    full, model = twins()
    shrink_(model, used_vocabulary())
    expected, _ = train(full)
    losses, _ = train(torch.compile(model, backend=backend))  # type: ignore[arg-type]
    torch.compiler.reset()
    assert losses == expected
    assert differing(full, model) == []


def test_the_context_manager_merges_even_when_training_raises() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="Expected input batch_size"), shrunk(model, used_vocabulary()):
        model(batch()["input_ids"], labels=torch.zeros(5, dtype=torch.int64))
    assert not status(model)
    assert differing(small_model(), model) == []


def test_status_says_where_how_much_and_what_it_saves() -> None:
    model = small_model()
    assert not status(model)
    shrink_(model, used_vocabulary())
    (table,) = status(model).tables
    rows = len(used_vocabulary())
    assert table.paths == (TABLE,)
    assert (table.num_rows, table.full_size, table.embedding_dim) == (rows, FULL_SIZE, 48)
    assert table.saved_bytes == status(model).saved_bytes == (FULL_SIZE - rows) * 48 * 4
    assert table.digest == used_vocabulary().digest


def test_gradients_that_wait_are_carried_over_and_back() -> None:
    full, model = twins()
    for each in (full, model):
        each.eval()(**batch()).loss.backward()
    shrink_(model, used_vocabulary())
    merge_(model)
    assert torch.equal(full.get_submodule(TABLE).weight.grad, model.get_submodule(TABLE).weight.grad)


# --- partial ids (the paper's D') -------------------------------------------------------------------------------------


def test_a_model_shrunk_for_partial_ids_takes_the_remapped_data() -> None:
    vocabulary = used_vocabulary(always_keep=range(3))
    full, model = twins()
    shrink_(model, vocabulary, ids="partial")
    expected, _ = train(full)
    inputs = batch()
    inputs["input_ids"] = vocabulary.to_partial(inputs["input_ids"])
    losses, _ = train(model, **inputs)
    assert losses == expected
    assert differing(full, model) == []


def test_labels_of_a_whole_output_layer_stay_full_ids_where_inputs_are_partial() -> None:
    vocabulary, ids = used_vocabulary(always_keep=range(3)), language_batch()["input_ids"]
    model = small_lm("llama-untied").eval()
    expected = model(input_ids=ids, labels=ids).loss
    shrink_(model, vocabulary, ids="partial", output="full")
    remapped = vocabulary.remap_dataset({"input_ids": ids, "labels": ids}, "input_ids")
    assert torch.equal(model(**remapped).loss, expected)


def test_partial_ids_are_refused_where_an_id_that_the_model_compares_would_move() -> None:
    with pytest.raises(VocabularyError, match=r'ids="partial" the id 0.*must keep its place.*always_keep=range\(1\)'):
        shrink_(small_model(), PartialVocabulary([1, 5, 9], FULL_SIZE), ids="partial")


def test_a_partial_id_out_of_range_is_an_error() -> None:
    model = shrink_(nn.Sequential(nn.Embedding(9, 4)), PartialVocabulary([3, 8], 9), ids="partial")
    with pytest.raises(IndexError, match=r"id 2 at position 1 of the input is not a partial id: expected 0 … 1"):
        model(torch.tensor([0, 2]))


# --- errors -----------------------------------------------------------------------------------------------------------


def test_shrinking_twice_is_an_error() -> None:
    model = shrink_(small_model(), used_vocabulary())
    with pytest.raises(AlreadyShrunkError, match=rf"is shrunk already \({TABLE}\); call merge_\(model\) first"):
        shrink_(model, used_vocabulary())


def test_merging_what_is_not_shrunk_is_an_error() -> None:
    with pytest.raises(NotShrunkError, match="there is nothing to merge; call shrink_ first"):
        merge_(small_model())
    with pytest.raises(NotShrunkError, match="its state dict is full in any case"), partial_state_dicts(small_model()):
        pass


@pytest.mark.parametrize("size", [FULL_SIZE - 1, FULL_SIZE + 1])
def test_a_vocabulary_of_another_size_is_an_error_that_says_how_to_build_it(size: int) -> None:
    with pytest.raises(
        VocabularyError, match=rf"full size is {size:,}, the table has 500 rows; build it with .*full_size=500"
    ):
        shrink_(small_model(), PartialVocabulary([3, 4], size), embedding=TABLE)


def test_a_vocabulary_whose_size_is_only_a_tokenizers_fits_a_longer_table() -> None:
    """Tables are often longer than their tokenizer: Qwen3, T5 and DeBERTaV3 have rows that no token has."""
    words = {f"word{i}": i for i in range(FULL_SIZE - 7)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="word0")))
    counts = count_tokens(batch()["input_ids"].clamp(max=FULL_SIZE - 8).numpy())
    vocabulary = PartialVocabulary.from_counts(counts, tokenizer=tokenizer)
    assert vocabulary.full_size == FULL_SIZE - 7
    for options in ({}, {"embedding": TABLE}):
        full, model = twins()
        shrink_(model, vocabulary | vocabulary, **options)
        assert status(model).tables[0].full_size == FULL_SIZE
        assert differing(full, merge_(model)) == []
    with pytest.raises(VocabularyError, match=r"full size is 493, the table has 500 rows"):
        shrink_(small_model(), PartialVocabulary(vocabulary.token_ids, FULL_SIZE - 7))
    with pytest.raises(VocabularyError, match=r"full size is 493, the table has 400 rows"):
        shrink_(small_model(vocab_size=400), vocabulary)


def test_a_table_that_is_no_embedding_is_named_by_its_class() -> None:
    class Quantized(nn.Module):
        pass

    class Model(nn.Module):
        def get_input_embeddings(self) -> nn.Module:
            return Quantized()

    with pytest.raises(
        ModelError, match=r"its input embeddings are a Quantized, expected a torch.nn.Embedding of 9 rows"
    ):
        shrink_(Model(), PartialVocabulary([3], 9))


def test_a_tied_output_layer_cannot_stay_full_without_its_table() -> None:
    tied = [
        RobertaForMaskedLM(
            RobertaConfig(vocab_size=FULL_SIZE, hidden_size=48, num_hidden_layers=1, num_attention_heads=4)
        ),
        BartForConditionalGeneration(BartConfig(vocab_size=FULL_SIZE, d_model=48, encoder_layers=1, decoder_layers=1)),
        small_model("llama-untied", tie_word_embeddings=True),
    ]
    for model in tied:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(TiedOutputError, match=r'is tied to the output layer .*output="frozen" keeps unused rows'):
            shrink_(model, used_vocabulary(), output="full")
        assert differing(before, model.state_dict()) == []
        assert status(shrink_(model, used_vocabulary())).output == "frozen"


def test_the_modes_of_the_output_side_are_checked() -> None:
    with pytest.raises(
        ModelError, match='has no output layer over the vocabulary, so output="restricted" means nothing'
    ):
        shrink_(small_model(), used_vocabulary(), output="restricted")
    with pytest.raises(ModelError, match="output='half': expected None, 'full', 'frozen' or 'restricted'"):
        shrink_(small_model(), used_vocabulary(), output="half")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="frozen_rows='disk': expected 'device' or 'host'"):
        shrink_(small_model(), used_vocabulary(), frozen_rows="disk")  # type: ignore[arg-type]
    assert status(shrink_(small_model(), used_vocabulary(), output="full"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding": "roberta.nowhere"}, r"has no module 'roberta.nowhere'; its embeddings are roberta.embeddings"),
        ({"embedding": "classifier.dense"}, r"classifier.dense is a Linear, expected a torch.nn.Embedding"),
        ({"ids": "both"}, "ids='both': expected 'full' or 'partial'"),
        ({"on_missing": "ignore"}, "on_missing='ignore': expected None, 'error', 'base', 'frozen' or 'extend'"),
    ],
)
def test_wrong_options_are_named_and_change_nothing(options: dict[str, Any], message: str) -> None:
    model = small_model()
    with pytest.raises(ModelError, match=message):
        shrink_(model, used_vocabulary(), **options)
    assert differing(small_model(), model) == []


def test_a_list_of_ids_instead_of_a_vocabulary_is_an_error_that_shows_the_way() -> None:
    with pytest.raises(VocabularyError, match=r"expected a PartialVocabulary .* found list; make one with"):
        shrink_(small_model(), [1, 2, 3])  # type: ignore[arg-type]


def test_a_module_that_does_not_name_its_table_is_asked_for_it() -> None:
    model = nn.ModuleList([nn.Embedding(9, 4), nn.Embedding(9, 4)])
    with pytest.raises(ModelError, match=r"2 of its embeddings have 9 rows; name it: embedding='path.to.module'"):
        shrink_(model, PartialVocabulary([3], 9))


def test_a_table_that_shares_memory_without_being_the_same_parameter_is_refused() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight.data = model["table"].weight.data
    with pytest.raises(TiedOutputError, match=r"table.weight is tied to the output layer head.weight"):
        shrink_(model, PartialVocabulary([3], 9), embedding="table")


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


COMPUTED = {
    "pruned": lambda table: prune.l1_unstructured(table, "weight", amount=0.2),
    "weight norm": lambda table: nn.utils.parametrizations.weight_norm(table),
    "parametrized": lambda table: nn.utils.parametrize.register_parametrization(table, "weight", Doubled()),
}


@pytest.mark.parametrize("then", ["forward", "state_dict", "merge"])
@pytest.mark.parametrize("how", COMPUTED)
def test_a_weight_that_is_computed_since_is_refused_before_it_is_used_or_saved(how: str, then: str) -> None:
    model = shrink_(small_model(), used_vocabulary())
    COMPUTED[how](model.get_input_embeddings())
    uses: dict[str, Any] = {
        "forward": lambda: model(**batch()), "state_dict": model.state_dict, "merge": lambda: merge_(model),
    }  # fmt: skip
    with pytest.raises(
        BypassError, match=r"word_embeddings: its weight is computed now .*call merge_\(model\), and then"
    ):
        uses[then]()


def test_a_quantized_or_parametrized_table_is_refused() -> None:
    parametrized = nn.Sequential(nn.Embedding(9, 4))
    nn.utils.parametrizations.weight_norm(parametrized[0])
    with pytest.raises(ModelError, match=r"its weight is computed \(parametrized\)"):
        shrink_(parametrized, PartialVocabulary([3], 9), embedding="0")


def test_a_store_folder_that_cannot_be_written_leaves_the_model_as_it_was() -> None:
    model = small_model()
    with pytest.raises(FileNotFoundError):
        shrink_(model, used_vocabulary(), store_dir="/nowhere/at/all")
    assert not status(model)
    assert differing(small_model(), model) == []


def test_an_untied_output_layer_stays_whole_and_scores_every_token() -> None:
    model = shrink_(small_model("llama-untied"), used_vocabulary())
    assert model.lm_head.weight.shape == (FULL_SIZE, 48)
    assert model(batch()["input_ids"]).logits.shape[-1] == FULL_SIZE


def test_a_generation_that_feeds_back_ids_that_nobody_counted_equals_the_full_models() -> None:
    """Trap: `generate` on an untied model emits ids that the partial input table lacks."""
    full, model = twins("llama-untied")
    shrink_(model, used_vocabulary())
    prompt = batch()["input_ids"][:2]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    expected = full.eval().generate(prompt, **options)
    with pytest.warns(UserWarning, match="served from the base"):
        assert torch.equal(model.eval().generate(prompt, **options), expected)
    assert unseen_ids().numel() > 0


def test_copies_of_a_module_that_run_in_threads_are_refused() -> None:
    model = shrink_(small_model(), used_vocabulary())
    copied = model.get_input_embeddings()._replicate_for_data_parallel()  # type: ignore[operator]
    copied.weight = model.get_input_embeddings().weight  # type: ignore[operator]
    with pytest.raises(
        BypassError, match=r"nn\.DataParallel runs copies of the model in threads.*CUDA_VISIBLE_DEVICES=0"
    ):
        copied(batch()["input_ids"])


def test_the_status_of_a_model_is_a_table_for_a_person():
    model = small_model()
    assert str(status(model)) == "not shrunk: every table is whole"
    shrink_(model, used_vocabulary())
    header, row = str(status(model)).splitlines()
    assert header.split() == ["table", "rows", "kept", "of", "saved", "output", "served", "from", "the", "base"]
    assert row.split()[:3] == ["roberta.embeddings.word_embeddings", f"{len(used_vocabulary())}", "500"]
