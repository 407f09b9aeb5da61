"""Models that a run starts from: a real model, or a tiny one that is made up."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from studies.output_modes.texts import Texts


@dataclass(frozen=True)
class Pretrained:
    """A tokenizer, and a way to get the same model again and again."""

    name: str
    tokenizer: Any
    load: Callable[[], Any]


def real_model(name_or_path: str) -> Pretrained:
    """A causal language model of the hub or of a folder, in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return Pretrained(
        name_or_path.rstrip("/").split("/")[-1],
        AutoTokenizer.from_pretrained(name_or_path),
        lambda: AutoModelForCausalLM.from_pretrained(name_or_path, dtype=torch.float32),
    )


def tiny_model(texts: Texts) -> Pretrained:
    """A Llama of some thousand parameters and random weights, tied, with a tokenizer that is trained on the texts."""
    tokenizer = _train_tokenizer([*texts.dataset, *(text for each in texts.held_out.values() for text in each)])

    def load() -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    return Pretrained("tiny", tokenizer, load)


def _train_tokenizer(sentences: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
