"""What a causal language model sees, by asking it."""

import pytest
import transformers
from texts import language_model

from leanvocab.errors import ModelError, SettingsError
from leanvocab.finetune.causal_checks import check_causal, check_packed_examples_are_apart


def bert(**changes):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=320, **sizes | changes))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_causal_models_pass_and_stay_in_their_mode(family):
    network = language_model(family).train()
    check_causal(network)
    assert network.training


def test_a_model_that_sees_what_it_is_to_predict_is_refused():
    with pytest.raises(ModelError, match=r"BertLMHeadModel sees the tokens that it is to predict, .* is_decoder=True"):
        check_causal(bert())
    check_causal(bert(is_decoder=True))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_examples_are_apart_where_the_mask_follows_the_positions(attention, family):
    network = language_model(family)
    network.set_attn_implementation(attention)
    check_packed_examples_are_apart(network)


def test_packing_is_refused_where_examples_would_see_one_another():
    # A state-space model carries its state over; it has no attention mask at all, nor positions.
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    network = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=320, **sizes))
    with pytest.raises(SettingsError, match=r"packing: .*MambaForCausalLM .*leave packing out"):
        check_packed_examples_are_apart(network)
    network = language_model("llama")
    forward = network.forward
    network.forward = lambda position_ids=None, **inputs: forward(**inputs)
    with pytest.raises(SettingsError, match="an example would see the one before it in the same block"):
        check_packed_examples_are_apart(network)
