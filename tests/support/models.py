"""Tiny models by family and size, and the ids that they are given. Every number is chosen so that remapping moves most ids."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from leanvocab.vocabulary.counts import count_tokens
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

FULL_SIZE, PAD = 500, 1


@dataclass(frozen=True)
class Size:
    """Numbers that models of every family share; None where the family's own default stands."""

    width: int
    inner: int
    layers: int = 2
    heads: int = 4
    dropout: float | None = 0.1
    positions: int | None = None
    pad: int = PAD
    bos: int = 0
    eos: int = 2

    @property
    def head_width(self) -> int:
        return self.width // self.heads


SMALL = Size(width=48, inner=64)
EXACT = Size(width=32, inner=48, dropout=0.0)  # what it computes is compared with a full model's
TEXT = Size(16, 32, layers=1, heads=2, dropout=None, positions=128, pad=0, bos=2, eos=3)  # of texts.small_tokenizer
DOORS = Size(width=64, inner=128)  # 8-bit optimizers leave smaller matrices alone

# What the configs of some families call these numbers.
_ENCODER = {
    "width": "hidden_size", "inner": "intermediate_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "dropout": "hidden_dropout_prob attention_probs_dropout_prob", "positions": "max_position_embeddings",
    "pad": "pad_token_id", "bos": "bos_token_id", "eos": "eos_token_id",
}  # fmt: skip
_DECODER = _ENCODER | {"dropout": "attention_dropout"}
_BART = _ENCODER | {
    "width": "d_model", "inner": "encoder_ffn_dim decoder_ffn_dim", "layers": "", "dropout": "dropout",
    "heads": "encoder_attention_heads decoder_attention_heads", "eos": "eos_token_id decoder_start_token_id",
}  # fmt: skip
_T5 = _ENCODER | {
    "width": "d_model", "inner": "d_ff", "layers": "", "heads": "num_heads", "head_width": "d_kv", "positions": "",
    "dropout": "dropout_rate", "pad": "pad_token_id decoder_start_token_id",
}  # fmt: skip
_GPT2 = _ENCODER | {
    "width": "n_embd", "inner": "", "layers": "n_layer", "heads": "n_head", "positions": "n_positions",
    "dropout": "attn_pdrop embd_pdrop resid_pdrop",
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A class of models, the names of its numbers, and what else its config says."""

    architecture: str
    head: str
    names: dict[str, str]
    config: dict[str, Any] = field(default_factory=dict)
    config_class: str = ""  # where it is not named as the architecture is


_TWO_KEYS: dict[str, Any] = {"num_key_value_heads": 2}
_ONE_LAYER_EACH: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
_WITH_OUTPUT_LAYERS = {
    "llama": Family("Llama", "ForCausalLM", _DECODER, _TWO_KEYS),
    "gpt2": Family("GPT2", "LMHeadModel", _GPT2),
    "t5": Family("T5", "ForConditionalGeneration", _T5, {"num_layers": 1}),
    "bart": Family("Bart", "ForConditionalGeneration", _BART, _ONE_LAYER_EACH),
    "bert": Family("Bert", "ForMaskedLM", _ENCODER),
}
_THREE_LABELS: dict[str, Any] = {"num_labels": 3}
FAMILIES = {
    "roberta": Family("Roberta", "ForSequenceClassification", _ENCODER, _THREE_LABELS),
    "bert": Family("Bert", "ForSequenceClassification", _ENCODER, _THREE_LABELS),
    "bart": Family("Bart", "ForSequenceClassification", _BART, _ONE_LAYER_EACH | _THREE_LABELS),
    "llama": Family("Llama", "ForSequenceClassification", _DECODER, _TWO_KEYS | _THREE_LABELS),
    **{
        f"{name}-{'tied' if ties else 'untied'}": Family(
            family.architecture, family.head, family.names, family.config | {"tie_word_embeddings": ties}
        )
        for name, family in _WITH_OUTPUT_LAYERS.items()
        for ties in (True, False)
    },
    # Families that do something to their logits, besides Bart and Bert, which add a bias.
    "gemma2-softcap": Family(
        "Gemma2", "ForCausalLM", _DECODER | {"head_width": "head_dim"}, _TWO_KEYS | {"final_logit_softcapping": 2.0}
    ),
    "cohere-scale": Family("Cohere", "ForCausalLM", _DECODER, _TWO_KEYS | {"logit_scale": 0.3}),
    "granite-scaling": Family(
        "Granite", "ForCausalLM", _DECODER, _TWO_KEYS | {"logits_scaling": 3.0, "tie_word_embeddings": True}
    ),
    "gemma4-untied": Family(  # a table for each layer, together twice as wide as the input table of doors
        "Gemma4",
        "ForCausalLM",
        _DECODER | {"head_width": "head_dim global_head_dim"},
        {
            "num_key_value_heads": 2,
            "vocab_size_per_layer_input": FULL_SIZE,
            "hidden_size_per_layer_input": 64,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": False,
        },
        "Gemma4TextConfig",
    ),
    "phi-bias": Family("Phi", "ForCausalLM", _DECODER, _TWO_KEYS | {"partial_rotary_factor": 0.5}),
}


def make_model(name: str, size: Size, **changes: Any) -> Any:
    """A randomly initialised model of a family, the same at each call."""
    family = FAMILIES[name]
    config: dict[str, Any] = {"vocab_size": FULL_SIZE}
    for number, names in family.names.items():
        if (value := getattr(size, number)) is not None:
            config |= dict.fromkeys(names.split(), value)
    config_class = getattr(transformers, family.config_class or f"{family.architecture}Config")
    torch.manual_seed(0)
    return getattr(transformers, family.architecture + family.head)(config_class(**family.config | config | changes))


def small_model(family: str = "roberta", **changes: Any) -> Any:
    """A model with dropout."""
    return make_model(family, SMALL, **changes)


def small_lm(family: str) -> Any:
    """A language model without dropout; biases of vocabulary size are not zero."""
    model = make_model(family, EXACT)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.shape in ((FULL_SIZE,), (1, FULL_SIZE)):
                tensor.normal_()
    return model


def twins(family: str = "roberta", **changes: Any) -> tuple[nn.Module, nn.Module]:
    """The same model twice."""
    model = small_model(family, **changes)
    return model, copy.deepcopy(model)


def small_gemma3n() -> Any:
    """The config of a Gemma 3n: a table for each layer, whose vocabulary is smaller than that of its input table."""
    return transformers.Gemma3nTextConfig(
        vocab_size=FULL_SIZE, vocab_size_per_layer_input=FULL_SIZE - 20, hidden_size=16, hidden_size_per_layer_input=8,
        intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_kv_shared_layers=0, layer_types=["full_attention"] * 2, activation_sparsity_pattern=[0.0] * 2, laurel_rank=2,
        pad_token_id=0,
    )  # fmt: skip


def batch(num_labels: int = 3) -> dict[str, Tensor]:
    """Six rows of ids up to FULL_SIZE - 1, one of them padded, with labels."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, FULL_SIZE, (6, 12), generator=generator)
    ids[:, 0], ids[:, -1] = 0, 2
    ids[0, 7], ids[0, 8:] = 2, PAD
    labels = torch.randint(0, num_labels, (6,), generator=generator)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def language_batch() -> dict[str, Tensor]:
    """The ids of `batch()`, which are their own labels."""
    inputs = batch()
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["input_ids"] == PAD, -100)}


def used_vocabulary(**options: Any) -> PartialVocabulary:
    """The ids of `batch()`: about 65 of 500, on both sides of the partial size."""
    return PartialVocabulary.from_counts(count_tokens(batch()["input_ids"].numpy()), full_size=FULL_SIZE, **options)


def unseen_ids() -> Tensor:
    """Ids that `batch()` does not have, all below its vocabulary's length: an index error would not show them."""
    vocabulary = used_vocabulary()
    return torch.tensor([[i for i in range(3, len(vocabulary)) if i not in vocabulary][:8]])
