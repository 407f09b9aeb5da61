"""Estimated bytes equal measured bytes, and the paper's parameter counts."""

import csv
import json
import math

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import leanvocab as lv
from leanvocab.errors import ModelError, SettingsError, VocabularyError
from leanvocab.partial.missing import MissingNote
from leanvocab.reports.peak import record_peak
from leanvocab.reports.state_bytes import OPTIMIZERS
from leanvocab.reports.units import format_bytes

FULL_ROWS, KEPT_ROWS = 300, 40

# What each name stands for, as a real optimizer.
REAL_OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    "sgd_momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "adafactor": lambda parameters: transformers.Adafactor(
        parameters, lr=1e-3, scale_parameter=False, relative_step=False
    ),
    "torch_adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-3),
}


def tiny_config(**changes):
    return transformers.RobertaConfig(
        **{
            "vocab_size": FULL_ROWS,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 20,
            "pad_token_id": 1,
            **changes,
        }
    )


def tiny_model(**changes):
    return transformers.RobertaForSequenceClassification(tiny_config(**changes))


def vocabulary():
    kept = np.random.default_rng(0).choice(FULL_ROWS, KEPT_ROWS, replace=False)
    kept[0] = 1  # the pad id
    return lv.PartialVocabulary(np.unique(kept), FULL_ROWS)


def measure_bytes(model, optimizer_name, kept):
    """What training really holds after one step: weights, gradients, states."""
    optimizer = REAL_OPTIMIZERS[optimizer_name]([p for p in model.parameters() if p.requires_grad])
    ids = torch.tensor(kept.token_ids[:12]).view(2, 6)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    return {
        "weights_bytes": sum(p.nbytes for p in model.parameters()),
        "gradients_bytes": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer_bytes": sum(value.nbytes for value in states if torch.is_tensor(value)),
    }


def estimated_bytes(footprint):
    return {name: getattr(footprint, name) for name in ("weights_bytes", "gradients_bytes", "optimizer_bytes")}


# Bytes are what is compared: that Adafactor mixes rows does not matter here.
@pytest.mark.filterwarnings("ignore:.*Adafactor is not row-separable")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", REAL_OPTIMIZERS)
def test_estimated_bytes_equal_the_bytes_of_a_real_training_step(optimizer, precision):
    kept = vocabulary()
    estimate = lv.estimate_memory(tiny_config(), kept, optimizer=optimizer, precision=precision)
    full, partial = tiny_model(), tiny_model()
    if precision == "bf16":
        full, partial = full.bfloat16(), partial.bfloat16()
    lv.shrink_(partial, kept)
    assert estimated_bytes(estimate.full) == measure_bytes(full, optimizer, kept)
    assert estimated_bytes(estimate.partial) == measure_bytes(partial, optimizer, kept)


def test_a_shrunk_model_is_estimated_as_the_model_that_it_came_from():
    kept = vocabulary()
    model = tiny_model()
    before = lv.estimate_memory(model, kept)
    lv.shrink_(model, kept)
    assert lv.estimate_memory(model) == lv.estimate_memory(model, kept)
    assert lv.estimate_memory(model).full == before.full
    assert lv.estimate_memory(model).partial == before.partial


def test_the_id_map_of_a_shrunk_model_is_counted_to_the_byte():
    model = tiny_model()
    lv.shrink_(model, vocabulary())
    table = model.get_input_embeddings()
    notes = [value for value in vars(table).values() if isinstance(value, MissingNote)]
    parts = (*vars(table).values(), *(part for note in notes for part in vars(note).values()))
    held = [value for value in parts if torch.is_tensor(value)]
    held += [value for value in table._buffers.values() if value is not None]
    assert lv.estimate_memory(model).partial.remap_bytes == sum(value.nbytes for value in held)


def test_a_shrunk_model_is_estimated_with_another_vocabulary_of_its_size():
    model = tiny_model()
    before = lv.estimate_memory(model, 77)
    lv.shrink_(model, vocabulary())
    assert lv.estimate_memory(model, 77) == before
    with pytest.raises(VocabularyError, match="full size is 299, the table has 300"):
        lv.estimate_memory(model, lv.PartialVocabulary([1, 2], 299))


def test_a_vocabulary_of_a_tokenizer_with_fewer_tokens_than_rows_fits_before_and_after_shrinking():
    words = {f"word{number}": number for number in range(FULL_ROWS - 10)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="word0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="word0", pad_token="word1")
    kept = lv.PartialVocabulary.from_counts(lv.count_tokens([[5, 250]]), tokenizer=tokenizer)
    model = tiny_model()
    before = lv.estimate_memory(model, kept)
    assert (before.tables[0].partial_rows, before.tables[0].full_rows) == (4, FULL_ROWS)
    lv.shrink_(model, kept)
    assert lv.estimate_memory(model, kept) == before


def test_frozen_parameters_have_neither_gradients_nor_states():
    kept = vocabulary()
    model = tiny_model()
    model.get_input_embeddings().weight.requires_grad_(False)
    model.roberta.encoder.layer[0].requires_grad_(False)
    estimate = lv.estimate_memory(model, kept)
    assert estimated_bytes(estimate.full) == measure_bytes(model, "adamw", kept)
    assert estimate.full.vocabulary_bytes == FULL_ROWS * 16 * 4
    assert estimate.saved_bytes == (FULL_ROWS - KEPT_ROWS) * 16 * 4 - estimate.partial.remap_bytes


def test_a_module_is_estimated_in_its_own_dtypes_unless_told_otherwise():
    model = tiny_model()
    model.roberta.embeddings.word_embeddings.bfloat16()
    own = lv.estimate_memory(model, KEPT_ROWS)
    assert own.precision == "bfloat16, float32"
    assert own.full.weights_bytes == sum(p.nbytes for p in model.parameters())
    assert lv.estimate_memory(model, KEPT_ROWS, precision="fp32").full.weights_bytes == 4 * own.full.num_parameters


def test_a_config_is_estimated_in_the_dtype_that_it_names():
    estimate = lv.estimate_memory(tiny_config(dtype="bfloat16"), KEPT_ROWS)
    assert estimate.precision == "bfloat16"
    assert estimate == lv.estimate_memory(tiny_model().bfloat16(), KEPT_ROWS)


class CastBytes(TorchDispatchMode):
    """Adds up the bf16 copies that are made of a model's parameters."""

    def __init__(self, model):
        super().__init__()
        self.parameters = {parameter.data_ptr() for parameter in model.parameters()}
        self.num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.parameters:
            self.num_bytes += result.nbytes
        return result


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        transformers.GPT2Config(vocab_size=FULL_ROWS, n_embd=16, n_layer=2, n_head=2, n_positions=20, pad_token_id=1),
    ],
    ids=lambda config: config.model_type,
)
def test_mixed_precision_counts_the_copies_that_autocast_makes(config):
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    ids = torch.arange(2, 14).view(2, 6)
    with CastBytes(model) as casts, torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    estimate = lv.estimate_memory(config, KEPT_ROWS, precision="mixed")
    assert casts.num_bytes > 0
    assert estimate.full.autocast_bytes == estimate.partial.autocast_bytes == casts.num_bytes
    assert estimate.full.weights_bytes == lv.estimate_memory(config, KEPT_ROWS, precision="fp32").full.weights_bytes


def test_8_bit_states_have_a_scale_per_block_and_spare_embeddings_and_small_parameters():
    """The same sum gave the bytes of bitsandbytes 0.50.2 set up as the Trainer does, on CPU."""
    model = tiny_model(hidden_size=64, intermediate_size=100)
    expected = 2 * 256 * 4  # two code books
    for name, parameter in model.named_parameters():
        if "embeddings" in name or parameter.numel() < 4096:  # LayerNorm's among them, which are small
            expected += 2 * parameter.numel() * 4
        else:
            expected += 2 * parameter.numel() + 2 * math.ceil(parameter.numel() / 256) * 4
    assert lv.estimate_memory(model, KEPT_ROWS, optimizer="adamw_8bit").full.optimizer_bytes == expected


def test_tied_tables_count_once_and_each_module_has_its_map():
    config = transformers.BartConfig(
        vocab_size=FULL_ROWS,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        max_position_embeddings=20,
    )
    model = transformers.BartForSequenceClassification(config)
    estimate = lv.estimate_memory(config, KEPT_ROWS)
    assert estimate.full.num_parameters == sum(p.numel() for p in model.parameters())
    assert estimate.full.num_parameters - estimate.partial.num_parameters == (FULL_ROWS - KEPT_ROWS) * 16
    holders = [m for m in model.modules() if getattr(m, "weight", None) is model.get_input_embeddings().weight]
    assert len(holders) > 1
    assert estimate.partial.remap_bytes == len(holders) * (8 * (FULL_ROWS + 2) + 24)


def test_several_tables_have_a_vocabulary_each():
    model = torch.nn.ModuleDict({"source": torch.nn.Embedding(50, 4), "target": torch.nn.Embedding(30, 4)})
    estimate = lv.estimate_memory(model, {"source": 10, "target": lv.PartialVocabulary([3, 7], 30)}, optimizer="sgd")
    assert [(t.path, t.full_rows, t.partial_rows) for t in estimate.tables] == [("source", 50, 10), ("target", 30, 2)]
    assert estimate.full.num_parameters == (50 + 30) * 4
    assert estimate.partial.num_parameters == (10 + 2) * 4


def test_counts_keep_their_used_ids():
    counts = lv.count_tokens([[3, 3, 7], [299]])
    estimate = lv.estimate_memory(tiny_config(), counts)
    assert estimate.tables[0].partial_rows == 3


def test_a_plain_module_is_estimated_by_the_path_of_its_table():
    model = torch.nn.Sequential(torch.nn.Embedding(50, 4), torch.nn.Linear(4, 2))
    with pytest.raises(ModelError, match=r"Sequential: found no table to take 10 rows of; give its path"):
        lv.estimate_memory(model, 10)
    assert lv.estimate_memory(model, 10, embedding="0").partial.num_parameters == 10 * 4 + 10


def test_a_folder_and_its_config_and_its_model_are_estimated_alike(tmp_path):
    folder = tmp_path / "tiny-roberta"
    model = tiny_model()
    model.config.save_pretrained(folder)
    by_folder = lv.estimate_memory(str(folder), KEPT_ROWS)
    assert by_folder.model == "tiny-roberta"
    assert (
        by_folder.full == lv.estimate_memory(model.config, KEPT_ROWS).full == lv.estimate_memory(model, KEPT_ROWS).full
    )


def test_a_config_of_gigabytes_is_estimated_without_memory_for_weights():
    config = transformers.XLMRobertaConfig(
        vocab_size=250_002, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    lv.estimate_memory(tiny_config(), KEPT_ROWS)  # imports what it needs
    with record_peak() as peak:
        estimate = lv.estimate_memory(config, 6_000)
    assert estimate.full.weights_bytes > 2e9
    assert peak.anonymous_growth_bytes < 100e6


def test_the_class_is_sequence_classification_unless_named():
    config = tiny_config(tie_word_embeddings=False)
    classifier = lv.estimate_memory(config, KEPT_ROWS)
    language_model = lv.estimate_memory(config, KEPT_ROWS, auto_class="AutoModelForCausalLM")
    by_object = lv.estimate_memory(config, KEPT_ROWS, auto_class=transformers.AutoModelForCausalLM)
    assert classifier.model == "RobertaForSequenceClassification"
    assert language_model == by_object
    assert language_model.full.num_parameters == sum(
        p.numel() for p in transformers.RobertaForCausalLM(config).parameters()
    )


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (0, "expected 1 to 300 rows kept, got 0"),
        (301, "expected 1 to 300 rows kept"),
        (lv.PartialVocabulary([1, 2], 299), "full size is 299, the table has 300"),
        (lv.count_tokens([[300]]), "300"),
        (None, "is not shrunk: give its vocabulary, or the number of rows"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_an_error(kept, message):
    with pytest.raises(VocabularyError, match=message):
        lv.estimate_memory(tiny_config(), kept)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "adam"}, "unknown optimizer 'adam': expected one of adamw, sgd"),
        ({"precision": "fp16"}, "unknown precision 'fp16': expected fp32, bf16, mixed"),
        ({"auto_class": "AutoModelForNothing"}, "no class 'AutoModelForNothing'"),
        ({"auto_class": "AutoModelForSeq2SeqLM"}, "AutoModelForSeq2SeqLM does not take 'roberta' models"),
        ({"embedding": "nowhere"}, "found no table to take 40 rows of"),
        ({"embedding": "classifier"}, "found no table to take 40 rows of"),
    ],
)
def test_an_argument_that_is_not_known_is_an_error_that_says_what_is(arguments, message):
    with pytest.raises((ModelError, SettingsError), match=message):
        lv.estimate_memory(tiny_config(), KEPT_ROWS, **arguments)


def test_what_is_no_model_is_an_error():
    with pytest.raises(ModelError, match=r"expected a name, a folder, a transformers config or an nn\.Module, got int"):
        lv.estimate_memory(3, KEPT_ROWS)


def test_totals_and_ratios_follow_from_the_parts():
    estimate = lv.estimate_memory(tiny_config(), KEPT_ROWS)
    for footprint in (estimate.full, estimate.partial):
        parts = ("weights", "gradients", "optimizer", "autocast", "buffers", "remap")
        assert footprint.total_bytes == sum(getattr(footprint, f"{part}_bytes") for part in parts)
    assert estimate.saved_bytes == estimate.full.total_bytes - estimate.partial.total_bytes
    assert estimate.saved_ratio == estimate.saved_bytes / estimate.full.total_bytes
    assert estimate.vocabulary_ratio == (4 * FULL_ROWS * 16 * 4 + 4) / estimate.full.total_bytes


def test_an_estimate_becomes_json_and_a_table():
    estimate = lv.estimate_memory(tiny_config(), KEPT_ROWS)
    read = json.loads(json.dumps(estimate.to_dict()))
    assert read["full"]["weights_bytes"] == estimate.full.weights_bytes
    assert read["partial"]["total_bytes"] == estimate.partial.total_bytes
    assert read["tables"][0]["partial_rows"] == KEPT_ROWS
    text = str(estimate)
    assert "40 of 300 rows, adamw, float32" in " ".join(text.split())
    assert format_bytes(estimate.full.optimizer_bytes) in text
    assert f"{100 * estimate.saved_ratio:.1f} %" in text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_000, "1.00 kB"),
        (12_340, "12.3 kB"),
        (99_960, "100 kB"),
        (999_600, "1.00 MB"),
        (1_112_180_744, "1.11 GB"),
        (4_096e9, "4,096 GB"),
    ],
)
def test_bytes_are_shown_with_three_digits(num_bytes, text):
    assert format_bytes(num_bytes) == text


def test_every_optimizer_is_measured_or_says_where_it_was():
    assert set(OPTIMIZERS) == {*REAL_OPTIMIZERS, "adamw_8bit"}


# The models of Tables 5 and 6, as changes to the configs that lie beside the project.
PAPER_MODELS = {
    "DistilBERT": ("distilbert-base-cased", {}),
    "DistilRoBERTa": ("roberta-base", {"num_hidden_layers": 6}),
    "DistilmBERT": ("distilbert-base-cased", {"vocab_size": 119_547}),
    "BERT": ("bert-base-cased", {}),
    "RoBERTa": ("roberta-base", {}),
    "DeBERTaV3": ("deberta-v3-base", {}),
    "mBERT": ("bert-base-multilingual-cased", {}),
    "XLM-RoBERTa": ("xlm-roberta-base", {}),
    "XLM-V": ("xlm-roberta-base", {"vocab_size": 901_629}),
}


def paper_rows(shared, name):
    with (shared / "paper" / "tables" / name).open() as file:
        return list(csv.DictReader(file))


def in_millions(footprint):
    return f"{footprint.num_vocabulary_parameters / 1e6:.1f}", f"{footprint.num_parameters / 1e6:.1f}"


@pytest.mark.shared_data
def test_parameters_are_those_of_the_papers_table_5(shared):
    for row in paper_rows(shared, "table5_model_sizes.csv"):
        folder, changes = PAPER_MODELS[row["model"]]
        config = transformers.AutoConfig.from_pretrained(shared / "data" / "tokenizers" / folder, **changes)
        full = lv.estimate_memory(config, 1_000).full
        assert in_millions(full) == (row["embedding_parameters_millions"], row["model_parameters_millions"]), row
        assert f"{100 * full.num_vocabulary_parameters / full.num_parameters:.1f}" == row["embedding_percent"], row


@pytest.mark.shared_data
def test_parameters_are_those_of_the_papers_table_6(shared):
    for row in paper_rows(shared, "table6_deberta_v3_sizes.csv"):
        config = transformers.AutoConfig.from_pretrained(
            shared / "data" / "tokenizers" / "deberta-v3-base",
            num_hidden_layers=int(row["layers"]),
            num_attention_heads=int(row["heads"]),
            hidden_size=int(row["hidden_size"]),
            pooler_hidden_size=int(row["hidden_size"]),
            intermediate_size=4 * int(row["hidden_size"]),
        )
        full = lv.estimate_memory(config, 1_000).full
        assert in_millions(full) == (row["embedding_parameters_millions"], row["model_parameters_millions"]), row
