"""The side of the model when a checkpoint is trimmed: which ids have to stay, its configs, its tensors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from comparing import same_bits
from safetensors.torch import load_file, save_file
from trimming import kept_of, new_ids_of, trim

from leanvocab.errors import CheckpointError, ModelError, VocabularyError
from leanvocab.files.headers import read_weights
from leanvocab.trimming.computed_ids import refuse_what_computes
from leanvocab.trimming.model_files import ModelFiles
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary
from versions import CONFIGS_ARE_CHECKED, needs_model_type

SIZE = 90
SMALL: dict[str, Any] = {
    "vocab_size": SIZE, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# What is said of a number that is none: when the config is read, or when a model is built of it.
NO_NUMBER = (
    (CheckpointError, "config.json cannot be read as BertConfig")
    if CONFIGS_ARE_CHECKED
    else (ModelError, "config.json: BertForMaskedLM cannot be built from this config: .*got str")
)
IDS = torch.tensor([[3, 80, 7, 41, 80, 2]])


def bert(**options: Any) -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL | options)).eval()


def saved(model: Any, folder: Path, **fields: Any) -> Path:
    """The model's folder; `fields` are put into its config.json, None takes one away."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in (config | fields).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def hidden_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        states: torch.Tensor = model.eval()(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    return states


def check_same_states(model: Any, folder: Path, lean: Path, vocabulary: PartialVocabulary) -> None:
    full, trimmed = (type(model).from_pretrained(each) for each in (folder, lean))
    assert same_bits(hidden_states(full, IDS), hidden_states(trimmed, new_ids_of(IDS, vocabulary)))


# --- ids that stay ----------------------------------------------------------------------------------------------------


def test_positions_that_are_counted_from_the_pad_id_are_the_same(tmp_path: Path) -> None:
    options = SMALL | {"pad_token_id": 5, "bos_token_id": 8, "eos_token_id": 9}
    model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**options))
    vocabulary, _ = trim(saved(model, tmp_path / "full"), tmp_path / "lean", IDS.unique().tolist())
    assert list(vocabulary) == [0, 1, 2, 3, 4, 5, 7, 8, 9, 41, 80]
    assert json.loads((tmp_path / "lean" / "config.json").read_text())["pad_token_id"] == 5
    check_same_states(model, tmp_path / "full", tmp_path / "lean", vocabulary)


@pytest.mark.parametrize(("eos", "needed"), [(2, [0, 1, 2, 89]), (88, [0, 1, 2, 88, 89])])
def test_clip_pools_at_the_same_token(tmp_path: Path, eos: int, needed: list[int]) -> None:
    """Whether by the old id of the end, which stands for the largest id, or by the end itself."""
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**SMALL | {"eos_token_id": eos, "bos_token_id": 1}))
    ids = torch.tensor([[1, 7, 41, 80, 89 if eos == 2 else eos]])
    vocabulary, _ = trim(saved(model, tmp_path / "full"), tmp_path / "lean", ids.unique().tolist())
    assert ModelFiles.read(tmp_path / "full").required_ids().tolist() == needed
    lean = transformers.CLIPTextModel.from_pretrained(tmp_path / "lean")
    with torch.no_grad():
        expected, found = model.eval()(ids).pooler_output, lean.eval()(new_ids_of(ids, vocabulary)).pooler_output
    assert same_bits(expected, found)


def test_whisper_keeps_all_times(tmp_path: Path) -> None:
    options = SMALL | {"encoder_layers": 1, "decoder_layers": 1, "decoder_start_token_id": 4}
    options |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**options))
    model.generation_config = transformers.GenerationConfig(
        no_timestamps_token_id=70, lang_to_id={"<|de|>": 11}, suppress_tokens=[5, 6, 11], pad_token_id=0, eos_token_id=2
    )
    folder = saved(model, tmp_path / "full", begin_suppress_tokens=[7, 11])
    files = ModelFiles.read(folder)
    assert files.required_ids().tolist() == [0, 1, 2, 4, 11, *range(70, 90)]
    trim(folder, tmp_path / "lean", [])
    generation = json.loads((tmp_path / "lean" / "generation_config.json").read_text())
    assert (generation["no_timestamps_token_id"], generation["lang_to_id"]) == (5, {"<|de|>": 4})
    assert generation["suppress_tokens"] == [4]
    assert json.loads((tmp_path / "lean" / "config.json").read_text())["begin_suppress_tokens"] == [4]


def test_an_id_that_has_to_stay_is_named_with_its_reason(tmp_path: Path) -> None:
    files = ModelFiles.read(saved(bert(), tmp_path))
    with pytest.raises(VocabularyError, match=r"id 2 is not kept, and has to be: config.json inserts them"):
        files.new_ids(PartialVocabulary([0, 1, 5], SIZE))
    with pytest.raises(VocabularyError, match=r"of 50 ids, and the model has 90 rows"):
        files.new_ids(PartialVocabulary([0, 1, 2], 50))


def test_the_id_that_is_written_over_placeholders_of_sounds_and_images_stays(tmp_path: Path) -> None:
    """Whatever is not a placeholder's feature is looked up at 0 (Granite Speech, Gemma 3)."""
    model = bert(pad_token_id=5)
    assert 0 not in ModelFiles.read(saved(model, tmp_path / "text")).required_ids()
    assert 0 in ModelFiles.read(saved(model, tmp_path / "sounds", audio_token_index=7)).required_ids()


# --- configs ----------------------------------------------------------------------------------------------------------


def test_config_json_keeps_its_own_fields_and_gets_defaults_that_change(tmp_path: Path) -> None:
    text = {name: value for name, value in SMALL.items() if name != "vocab_size"}
    config = transformers.Gemma3Config(text_config={**text, "head_dim": 8, "sliding_window": 8}, vision_config={})
    plain = json.loads(config.to_json_string())
    plain.pop("image_token_index")
    assert plain["text_config"].pop("vocab_size") == 262_208
    files = ModelFiles({"config.json": plain | {"of_others": {"kept": 1}}})
    new_ids = files.new_ids(PartialVocabulary(files.required_ids(), files.full_size))
    made = json.loads(files.written(new_ids)["config.json"])
    assert made["text_config"]["vocab_size"] == len(files.required_ids())
    assert made["image_token_index"] == int(np.searchsorted(files.required_ids(), 262_144))
    assert made["of_others"] == {"kept": 1}
    assert set(made) == {*plain, "of_others", "image_token_index"}
    assert set(made["text_config"]) == {*plain["text_config"], "vocab_size"}


def test_other_names_of_a_field_give_way(tmp_path: Path) -> None:
    config = transformers.XLMConfig(emb_dim=16, n_layers=1, n_heads=2, n_words=SIZE, pad_index=5, mask_token_id=7)
    folder = saved(transformers.XLMModel(config), tmp_path / "full", vocab_size=None, n_words=SIZE)
    vocabulary, _ = trim(folder, tmp_path / "lean", [3, 80])
    made = json.loads((tmp_path / "lean" / "config.json").read_text())
    assert ("n_words" in made, made["vocab_size"]) == (False, len(vocabulary))
    assert transformers.XLMModel.from_pretrained(tmp_path / "lean").embeddings.num_embeddings == len(vocabulary)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"model_type": "of_my_own"},
            ModelError,
            "model_type is 'of_my_own', which this version of transformers does not know",
        ),
        (
            {"model_type": "canine"},
            ModelError,
            "'canine' cannot be trimmed: it has no vocabulary: it hashes characters",
        ),
        pytest.param(
            {"model_type": "musicgen_decoder"},
            ModelError,
            "cannot be trimmed: ids in its configs are codes of sounds",
            marks=needs_model_type("musicgen_decoder"),
        ),
        (
            {"model_type": "ibert", "quant_mode": True},
            ModelError,
            "quant_mode=True cannot be trimmed: it rounds its rows",
        ),
        (
            {"model_type": "marian", "decoder_vocab_size": 80},
            ModelError,
            "a vocabulary for each side, of 80 and 90 tokens",
        ),
        (
            {"model_type": "fsmt", "src_vocab_size": 50},
            ModelError,
            "each side, of 50 and 90 tokens",
        ),
        ({"hidden_size": "wide"}, *NO_NUMBER),
        ({"num_attention_heads": 3}, ModelError, "config.json: BertForMaskedLM cannot be built from this config: "),
        ({"magic_token_number_ids": [5], "last_token": 7}, CheckpointError, "seems to be a token id"),
    ],
)
def test_what_cannot_be_trimmed_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ModelFiles.read(saved(bert(), tmp_path, **fields))


def test_n_grams_of_ids_are_refused() -> None:
    part = {"ple_layer_ids": [1], "ngram_size": 3}
    for config in ({"model_type": "qwen4_exp", **part}, {"model_type": "qwen4_exp", "text_config": part}):
        with pytest.raises(
            ModelError, match=r"this qwen4_exp cannot be trimmed: it hashes n-grams of ids.*\(ple_layer_ids\)"
        ):
            refuse_what_computes(config)
    refuse_what_computes({"model_type": "qwen4_exp", **part, "ple_layer_ids": []})


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected config.json, found none"):
        ModelFiles.read(tmp_path)


def test_infinity_in_a_config_is_read_and_written(tmp_path: Path) -> None:
    config = transformers.Mamba2Config(
        hidden_size=16, num_heads=4, head_dim=8, n_groups=1, num_hidden_layers=1, vocab_size=SIZE, state_size=8
    )
    folder = saved(transformers.Mamba2ForCausalLM(config), tmp_path / "full", time_step_limit=[0.0, float("inf")])
    assert "Infinity]" in (folder / "config.json").read_text()
    trim(folder, tmp_path / "lean", [3, 80])
    assert transformers.Mamba2Config.from_pretrained(tmp_path / "lean").time_step_limit[1] == float("inf")


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_layers_as_wide_as_the_vocabulary_stay(tmp_path: Path) -> None:
    model = bert(vocab_size=32, max_position_embeddings=32, hidden_size=32)
    folder = saved(model, tmp_path / "full")
    vocabulary, changed = trim(folder, tmp_path / "lean", [3, 9])
    assert {name: change.dims for name, change in changed.items()} == {
        "bert.embeddings.word_embeddings.weight": (0,),
        "cls.predictions.bias": (0,),
    }
    assert same_bits(
        transformers.BertForMaskedLM.from_pretrained(tmp_path / "lean").get_input_embeddings().weight,
        kept_of(model.get_input_embeddings().weight, 0, vocabulary),
    )


@pytest.mark.parametrize("make", [transformers.BertModel, transformers.BertForSequenceClassification])
def test_models_without_an_output_layer(tmp_path: Path, make: Any) -> None:
    model = make(transformers.BertConfig(**SMALL))
    vocabulary, changed = trim(saved(model, tmp_path / "full"), tmp_path / "lean", IDS.unique().tolist())
    assert [name.removeprefix("bert.") for name in changed] == ["embeddings.word_embeddings.weight"]
    check_same_states(model, tmp_path / "full", tmp_path / "lean", vocabulary)


@pytest.mark.parametrize("architecture", ["BertModel", "AClassOfMyOwn"])
def test_tensors_that_the_class_does_not_have_are_cut_too(tmp_path: Path, architecture: str) -> None:
    """A base model that was made of a checkpoint with a head, and classes that others have written around one."""
    folder = saved(bert(), tmp_path / "full", architectures=[architecture])
    tensors = load_file(folder / "model.safetensors") | {"projection.weight": torch.zeros(4, 16)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    vocabulary, changed = trim(folder, tmp_path / "lean", IDS.unique().tolist())
    assert sorted(changed) == ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"]
    check_same_states(bert(), folder, tmp_path / "lean", vocabulary)


def test_a_tensor_of_an_unknown_name_that_may_be_anything_is_named(tmp_path: Path) -> None:
    folder = saved(bert(vocab_size=32), tmp_path)
    tensors = load_file(folder / "model.safetensors") | {"projection.weight": torch.zeros(32, 16)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"projection.weight \(32, 16\) has the size of the vocabulary, and the model has no"
    ):
        trim(folder, tmp_path / "lean", [3])


def test_names_without_the_prefix_of_a_head_and_shards(tmp_path: Path) -> None:
    model = bert()
    saved(model, tmp_path / "one")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    tensors = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "one" / "model.safetensors", {"format": "pt"})
    assert sorted(trim(tmp_path / "one", tmp_path / "lean", [3])[1]) == [
        "cls.predictions.bias",
        "embeddings.word_embeddings.weight",
    ]
    model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(read_weights(tmp_path / "shards").files) > 1
    vocabulary, _ = trim(tmp_path / "shards", tmp_path / "of_shards", IDS.unique().tolist())
    check_same_states(model, tmp_path / "shards", tmp_path / "of_shards", vocabulary)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = saved(bert(), tmp_path / "full", vocab_size=70)
    with pytest.raises(
        CheckpointError, match=r"has the shape \(90, 16\) in the checkpoint, and \(70, 16\) by its config"
    ):
        trim(folder, tmp_path / "lean", [3])


def test_all_ids_kept_change_nothing(tmp_path: Path) -> None:
    folder = saved(bert(), tmp_path / "full")
    _, changed = trim(folder, tmp_path / "lean", range(SIZE))
    assert changed == {}
    assert json.loads((tmp_path / "lean" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )


# --- padding ----------------------------------------------------------------------------------------------------------


def test_padding_is_in_the_sizes(tmp_path: Path) -> None:
    files = ModelFiles.read(saved(bert(), tmp_path))
    new_ids = files.new_ids(PartialVocabulary([0, 1, 2, 3, 80], SIZE), 8)
    assert json.loads(files.written(new_ids)["config.json"])["vocab_size"] == 8
    changed = files.trimmed_tensors(read_weights(tmp_path).shapes, new_ids)
    assert changed["bert.embeddings.word_embeddings.weight"].shape == (8, 16)


def test_padding_that_makes_as_many_rows_as_there_were_is_refused(tmp_path: Path) -> None:
    files = ModelFiles.read(saved(bert(), tmp_path))
    with pytest.raises(VocabularyError, match="5 kept rows, padded to a multiple of 90, are no fewer than the 90"):
        files.new_ids(PartialVocabulary([0, 1, 2, 3, 80], SIZE), 90)


@pytest.mark.parametrize("kind", ["bert", "bart"])
def test_settings_of_generation_that_no_class_reads_are_renumbered_too(tmp_path: Path, kind: str) -> None:
    options = SMALL | {"encoder_layers": 1, "decoder_layers": 1, "forced_eos_token_id": 2, "decoder_start_token_id": 2}
    model = bert() if kind == "bert" else transformers.BartModel(transformers.BartConfig(**options | {"d_model": 16}))
    unread = {"bad_words_ids": [[5], [41, 80]], "forced_bos_token_id": 41, "num_beams": 4}
    folder = saved(model, tmp_path / "full", **unread)
    vocabulary, _ = trim(folder, tmp_path / "lean", [80])
    ids = {token_id: at for at, token_id in enumerate(vocabulary)}
    assert 41 in ids
    assert 5 not in ids
    config = json.loads((tmp_path / "lean" / "config.json").read_text())
    meant = {"bad_words_ids": [[ids[41], ids[80]]], "forced_bos_token_id": ids[41], "num_beams": 4}
    assert {name: config[name] for name in unread} == meant


@needs_model_type("mllama_text_model")
def test_padding_is_refused_where_ids_lie_behind_the_vocabulary(tmp_path: Path) -> None:
    config = transformers.models.mllama.configuration_mllama.MllamaTextConfig(
        **SMALL | {"num_key_value_heads": 2, "cross_attention_layers": []}
    )
    model = transformers.MllamaForCausalLM(config)
    folder = saved(model, tmp_path / "full")
    files = ModelFiles.read(folder)
    assert (files.text_size, files.full_size) == (SIZE, SIZE + 8)
    assert set(range(SIZE, SIZE + 8)) <= set(files.required_ids().tolist())
    vocabulary, changed = trim(folder, tmp_path / "lean", IDS.unique().tolist())
    assert changed["lm_head.weight"].shape == (len(vocabulary) - 8, 16)
    check_same_states(model, folder, tmp_path / "lean", vocabulary)
    with pytest.raises(ModelError, match="MllamaForCausalLM computes with ids behind its vocabulary"):
        files.new_ids(vocabulary, 64)
