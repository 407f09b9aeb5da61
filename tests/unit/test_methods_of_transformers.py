"""Every public method of transformers' models on a shrunk one: as on the full model, or refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import peft
import pytest
import torch
import transformers
from comparing import bits, differing
from models import FULL_SIZE, batch, small_model, twins, used_vocabulary
from safetensors.torch import load_file
from torch import nn
from transformers.utils import hub

from leanvocab.errors import BypassError
from leanvocab.model.shrink import merge_, shrink_
from leanvocab.partial.module import partial_modules

FAMILIES = ["roberta", "bert-tied", "bert-untied", "llama-tied", "llama-untied", "bart-tied", "t5-tied"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def saved(model: Any, folder: Path) -> dict[str, bytes]:
    model.save_pretrained(folder)
    return files(folder)


def pushed(model: Any, _: Path) -> dict[str, bytes]:
    """What would be uploaded."""
    pushes: list[dict[str, bytes]] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("hf_api", "create_repo", "create_and_tag_model_card"):
            patch.setattr(hub, name, MagicMock(), raising=False)
        patch.setattr(
            hub.PushToHubMixin,
            "_upload_modified_files",
            lambda _, folder, *__, **___: pushes.append(files(Path(folder))),
        )
        model.push_to_hub("someone/something")
    return pushes[0]


def generated(model: Any, _: Path) -> Any:
    if not model.can_generate():
        return None
    return model.eval().generate(batch()["input_ids"][:2], max_new_tokens=4, do_sample=False).tolist()


def kinds(value: Any) -> Any:
    return getattr(type(value), "original_class", type(value)).__name__


def counts(model: Any, _: Path) -> list[int]:
    model.get_parameter(next(name for name, _ in model.named_parameters() if "norm" in name.lower())).requires_grad_(
        False
    )
    return [model.num_parameters(trainable, exclude) for trainable in (False, True) for exclude in (False, True)]


def with_adapter(model: Any, folder: Path) -> list[Any]:
    """What the methods for adapters give, with LoRA in the layers of attention."""
    torch.manual_seed(0)
    names = [name for name, layer in model.named_modules() if "att" in name.lower() and type(layer) is nn.Linear]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    told = [{name: bits(value) for name, value in model.get_adapter_state_dict().items()}, model.active_adapters()]
    model.disable_adapters()
    model.enable_adapters()
    model.set_adapter("default")
    model.save_pretrained(folder)
    model.delete_adapter("default")
    model.load_adapter(str(folder), adapter_name="again")
    return [*told, model.active_adapters(), saved(model, folder / "again")]


def setting(what: str) -> Callable[..., Any]:
    def call(model: Any, _: Path) -> None:
        getattr(model, f"set_{what}")(getattr(model, f"get_{what}")())

    return call


def outcome(call: Callable[..., Any]) -> Callable[..., Any]:
    def either(model: Any, folder: Path) -> Any:
        try:
            return call(model, folder)
        except (NotImplementedError, AttributeError) as error:
            return type(error), str(error).replace("Remap", "")

    return either


def method(name: str, *args: Any) -> Callable[..., Any]:
    return lambda model, _: getattr(model, name)(*args)


SAME: dict[str, Callable[[Any, Path], Any]] = {
    **{
        name: method(name)
        for name in [
            "activation_checkpointing_enable",
            "activation_checkpointing_disable",
            "gradient_checkpointing_enable",
            "can_generate",
            "gradient_checkpointing_disable",
            "enable_input_require_grads",
            "init_weights",
            "initialize_weights",
            "post_init",
            "tie_weights",
            "is_custom_code",
            "is_remote_code",
            "init_parallel_plans",
        ]
    },
    **{
        name: (lambda model, _, name=name: str(getattr(model, name)))
        for name in [
            "device",
            "dtype",
            "fsdp_size",
            "tp_size",
            "tp_plan",
            "ep_plan",
            "pp_plan",
            "fsdp_plan",
            "is_activation_checkpointing",
            "model_tags",
            "is_gradient_checkpointing",
            "supports_context_parallel",
            "supports_pp_plan",
            "supports_tp_plan",
            "use_kernels",
            "is_distributed_loading_by_transformers",
            "dummy_inputs",
        ]
    },
    "add_model_tags": method("add_model_tags", "lean"),
    "base_model": lambda model, _: kinds(model.base_model),
    "disable_input_require_grads": lambda model, _: (
        model.enable_input_require_grads(),
        model.disable_input_require_grads(),
    )[1],
    "generate": generated,
    "get_decoder": outcome(lambda model, _: kinds(model.get_decoder())),
    "get_encoder": outcome(lambda model, _: kinds(model.get_encoder())),
    "get_expanded_tied_weights_keys": method("get_expanded_tied_weights_keys", True),
    "get_input_embeddings": lambda model, _: (
        kinds(model.get_input_embeddings()),
        model.get_input_embeddings().num_embeddings,
    ),
    "get_output_embeddings": lambda model, _: getattr(model.get_output_embeddings(), "out_features", None),
    "get_position_embeddings": outcome(method("get_position_embeddings")),
    "named_non_persistent_buffers": lambda model, _: [name for name, _ in model.named_non_persistent_buffers()],
    "num_parameters": counts,
    "push_to_hub": pushed,
    "resize_position_embeddings": outcome(method("resize_position_embeddings", 80)),
    "retrieve_modules_from_names": lambda model, _: list(
        map(kinds, model.retrieve_modules_from_names(["lm_head", "embed_tokens"]))
    ),
    "save_pretrained": saved,
    "set_attn_implementation": method("set_attn_implementation", "eager"),
    "set_decoder": outcome(setting("decoder")),
    "set_encoder": outcome(setting("encoder")),
    "set_input_embeddings": setting("input_embeddings"),
    "set_output_embeddings": outcome(setting("output_embeddings")),
    "warn_if_padding_and_no_attention_mask": lambda model, _: model.warn_if_padding_and_no_attention_mask(
        batch()["input_ids"], None
    ),
}
BY_ADD_ADAPTER = {
    "add_adapter", "active_adapters", "delete_adapter", "disable_adapters", "enable_adapters", "get_adapter_state_dict",
    "load_adapter",     "set_adapter",
}  # fmt: skip
REFUSED = {"resize_token_embeddings"}
NOT_FOR_A_SHRUNK_MODEL = {
    "adjust_generation_fn barrier_after_gathered_checkpoint_save from_pretrained get_init_context maybe_distribute_model "
    "mark_tied_weights_as_initialized prepare_distribute_model load_custom_generate": "makes a model, of no shrunk one",
    "backward_compat base_model_prefix can_record_outputs config_class generation_config_class input_modalities main_input_name "
    "output_modalities supports_gradient_checkpointing loss_function": "says something of the class",
    "compute_transition_scores heal_tokens prepare_decoder_input_ids_from_labels "
    "prepare_inputs_for_generation generate_batch init_continuous_batching "
    "continuous_batching_context_manager destroy_cached_continuous_batching_manager": "part of generating",
    "get_correct_attn_implementation get_correct_experts_implementation get_experts_implementation set_experts_implementation "
    "set_use_kernels is_backend_compatible register_for_auto_class get_compiled_call": "knows of no weight",
    "create_extended_attention_mask_for_decoder get_extended_attention_mask invert_attention_mask kernelize "
    "dtype_plan": "of earlier versions, and knows of no weight",
    "dequantize": "of models in few bits",
    "enable_peft_hotswap": "of adapters that are compiled",
    "gather_sharded_state_dict_for_save save_distributed_checkpoint should_save_on_this_rank": "of several processes",
    "get_memory_footprint get_parameter_or_buffer": "what is there, as parameters() is",
}  # fmt: skip


def public_methods() -> set[str]:
    families = [type(small_model(family)) for family in FAMILIES]
    return {name for family in families for name in set(dir(family)) - set(dir(nn.Module)) if not name.startswith("_")}


def test_every_public_method_is_tried_or_named_here() -> None:
    """A new one of transformers belongs into one of the lists above."""
    named = {*SAME, *BY_ADD_ADAPTER, *REFUSED, *(name for names in NOT_FOR_A_SHRUNK_MODEL for name in names.split())}
    assert sorted(public_methods() - named) == []


@pytest.mark.filterwarnings(
    "ignore:ids outside|.*are served from the base", "ignore:.*gradient_checkpointing:FutureWarning"
)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SAME)
def test_a_method_does_what_it_does_on_the_full_model(name: str, family: str, tmp_path: Path) -> None:
    full, model = twins(family)
    if name.isidentifier() and not hasattr(full, name):
        pytest.skip(f"{name} is of another version of transformers")
    shrink_(model, used_vocabulary())
    told = []
    for each, folder in ((full, "full"), (model, "lean")):
        (tmp_path / folder).mkdir()
        told.append(SAME[name](each, tmp_path / folder))
    assert told[0] == told[1] or (name in ("init_weights", "initialize_weights") and None in told)
    assert differing(full, model) == []
    assert partial_modules(model)
    (tmp_path / "after").mkdir()
    saved(model, tmp_path / "after")
    assert differing(full, type(full).from_pretrained(tmp_path / "after")) == []
    assert differing(full, merge_(model)) == []


def test_the_footprint_of_memory_is_what_is_held() -> None:
    full, model = twins()
    shrink_(model, used_vocabulary())
    absent = (FULL_SIZE - len(used_vocabulary())) * 48 * 4
    assert model.get_memory_footprint() == full.get_memory_footprint() - absent  # type: ignore[operator]


def test_an_untied_output_layer_counts_in_full() -> None:
    full, model = twins("llama-untied")
    shrink_(model, used_vocabulary(), output="frozen")
    for exclude in (False, True):
        assert model.num_parameters(exclude_embeddings=exclude) == full.num_parameters(exclude_embeddings=exclude)  # type: ignore[operator]


@pytest.mark.parametrize("family", ["bert-tied", "bart-tied", "t5-tied", "llama-tied", "bert-untied"])
def test_a_model_that_was_tied_again_is_saved_whole_and_loads(family: str, tmp_path: Path) -> None:
    full, model = twins(family)
    shrink_(model, used_vocabulary())
    for part in model.modules():
        if hasattr(part, "tie_weights"):
            part.tie_weights()
    model.save_pretrained(tmp_path)
    for name, value in load_file(tmp_path / "model.safetensors").items():
        assert value.shape == full.state_dict()[name].shape, name
    assert differing(full, type(full).from_pretrained(tmp_path)) == []
    assert differing(full, merge_(model)) == []


@pytest.mark.parametrize("output", ["full", "frozen"])
def test_tying_what_was_not_tied_is_refused_and_changes_nothing(output: Any) -> None:
    full, model = twins("llama-untied")
    shrink_(model, used_vocabulary(), output=output)
    model.config.tie_word_embeddings = True
    with pytest.raises(
        BypassError, match=r"tie_weights: \w+ would be tied to another matrix .*call merge_\(model\), tie"
    ):
        model.tie_weights()
    assert differing(full, model) == []
    assert len(partial_modules(model)) == (1 if output == "full" else 2)


INITIALIZERS: dict[str, Callable[[Any], Any]] = {
    "_init_weights": lambda model: model._init_weights(model.get_input_embeddings()),
    "apply": lambda model: model.apply(model._init_weights),
    "reset_parameters": lambda model: model.get_input_embeddings().reset_parameters(),
    "of the output layer": lambda model: model.get_output_embeddings().reset_parameters(),
}


@pytest.mark.parametrize("initialize", INITIALIZERS)
def test_new_random_weights_are_refused(initialize: str) -> None:
    model = shrink_(small_model("bert-tied"), used_vocabulary())
    before = bits(model.get_input_embeddings().weight)
    with pytest.raises(BypassError, match=r"word_embeddings: new random weights .*call merge_\(model\) first"):
        INITIALIZERS[initialize](model)
    assert bits(model.get_input_embeddings().weight) == before


def test_other_modules_get_new_weights() -> None:
    model = shrink_(small_model(), used_vocabulary())
    model._init_weights(model.classifier.dense)


@pytest.mark.parametrize("name", ["resize_token_embeddings", "resize_decoder_token_embeddings"])
def test_resizing_is_refused_by_the_name_that_was_called(name: str) -> None:
    config = transformers.MarianConfig(
        vocab_size=FULL_SIZE, decoder_vocab_size=FULL_SIZE, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=1,
        decoder_start_token_id=1, share_encoder_decoder_embeddings=False, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.MarianMTModel(config)
    shrink_(model, used_vocabulary(), embedding="model.decoder.embed_tokens", output="full")
    with pytest.raises(BypassError, match=rf"^{name}: model\.decoder\.embed_tokens is shrunk"):
        getattr(model, name)(510)
