"""New tokens alone train: the ten most frequent pairs of words become a token each, and every other row stays as it is.

python examples/new_tokens.py MODEL DATA.csv OUTPUT        (column text)
"""

import itertools
import sys
from collections import Counter

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import leanvocab as lv
from leanvocab.adapters.exporting import export_trainable_tokens
from leanvocab.finetune.collators import PaddingCollator


def main(name: str, data: str, output: str) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
    texts = list(load_dataset("csv", data_files=data, split="train")["text"])
    pairs = Counter(map(" ".join, itertools.pairwise(" ".join(texts).split())))
    pieces = {pair: tokenizer(pair, add_special_tokens=False)["input_ids"] for pair, _ in pairs.most_common(10)}
    tokenizer.add_tokens(list(pieces))
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    weight = model.get_input_embeddings().weight.data  # which a tied output layer holds too
    for pair, ids in pieces.items():
        weight[tokenizer.convert_tokens_to_ids(pair)] = weight[ids].mean(0)
    _ = model.save_pretrained(f"{output}/base"), tokenizer.save_pretrained(f"{output}/base")
    model = AutoModelForCausalLM.from_pretrained(f"{output}/base").requires_grad_(False)
    new = lv.PartialVocabulary(tokenizer.convert_tokens_to_ids(list(pieces)), len(tokenizer))
    lv.shrink_(model, new, on_missing="frozen").get_input_embeddings().weight.requires_grad_(True)
    rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer(texts)["input_ids"]]
    arguments = TrainingArguments(output, learning_rate=1e-3, save_strategy="no", report_to="none")
    Trainer(model, arguments, PaddingCollator(tokenizer.eos_token_id), train_dataset=rows).train()
    export_trainable_tokens(model, f"{output}/adapter", base=f"{output}/base")  # the new rows alone
    _ = model.save_pretrained(output), tokenizer.save_pretrained(output)  # or everything
    print(f"trained {len(new):,} of {new.full_size:,} rows, output={lv.status(model).output!r}")


main(*sys.argv[1:])
