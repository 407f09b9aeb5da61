"""Small language models and texts for them: prompts with completions, texts, chats; tied and untied."""

from pathlib import Path
from typing import Any

import torch
import transformers
from small_text import FULL_SIZE, SPECIAL, WORDS, rows, small_tokenizer, write

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '[CLS] ' + ('word298' if message['role'] == 'user' else 'word299') + ' ' "
    "+ message['content'] + ' [SEP] ' }}{% endfor %}{% if add_generation_prompt %}{{ '[CLS] word299 ' }}{% endif %}"
)


def language_tokenizer(**special: Any) -> Any:
    """The small tokenizer with an end of sequence, [SEP], and a beginning of sequence, [CLS]."""
    return small_tokenizer(**{"eos_token": "[SEP]", "bos_token": "[CLS]"} | special)


def language_model(family: str, *, tied: bool = False, **changes: Any) -> Any:
    """A randomly initialised model with an output layer; the same at each call."""
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    usual = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    common = {"vocab_size": FULL_SIZE, "tie_word_embeddings": tied, **ids}
    if family == "llama":
        config = transformers.LlamaConfig(**common | usual | {"max_position_embeddings": 128} | changes)
        return transformers.LlamaForCausalLM(config)
    if family == "gpt2":
        gpt2 = {"n_positions": 128, "n_embd": 16, "n_layer": 1, "n_head": 2}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**common | gpt2 | changes))
    if family == "t5":
        t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**common | t5 | changes))
    if family == "bart":
        bart = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 3}
        config = transformers.BartConfig(**common | bart | heads | {"max_position_embeddings": 128} | changes)
        return transformers.BartForConditionalGeneration(config)
    if family == "bert":
        config = transformers.BertConfig(**common | usual | {"max_position_embeddings": 128} | changes)
        return transformers.BertForMaskedLM(config)
    raise ValueError(family)


def save_language_model(folder: Path, family: str, tokenizer: Any = None, **options: Any) -> Path:
    """A folder as a published language model has it."""
    language_model(family, **options).save_pretrained(folder)
    (tokenizer or language_tokenizer()).save_pretrained(folder)
    return folder


def texts(num_rows: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    return [{"text": row["text"]} for row in rows(num_rows, seed)]


def pairs(num_rows: int = 24, seed: int = 0, names: tuple[str, str] = ("prompt", "completion")) -> list[dict[str, Any]]:
    """A prompt of words, and its words backwards."""
    prompts = [row["text"] for row in rows(num_rows, seed)]
    return [{names[0]: prompt, names[1]: " ".join(prompt.split()[::-1][:4])} for prompt in prompts]


def chats(num_rows: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p["completion"]}]}
        for p in pairs(num_rows, seed)
    ]


def write_language_splits(folder: Path, make: Any = texts) -> Path:
    """train and validation, as JSON lines."""
    write(folder / "train.jsonl", make(24, seed=0))
    write(folder / "validation.jsonl", make(10, seed=1))
    return folder


def ids_of(text: str) -> list[int]:
    """Token ids of words, without any special token."""
    return [len(SPECIAL) + WORDS.index(word) for word in text.split()]
