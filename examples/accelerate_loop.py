"""A loop of one's own with accelerate, in one process or in several: accelerate launch examples/accelerate_loop.py …

python examples/accelerate_loop.py MODEL DATA.csv OUTPUT        (columns text and label)
"""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import leanvocab as lv


def main(name: str, data: str, output: str) -> None:
    accelerator = Accelerator()
    tokenizer = AutoTokenizer.from_pretrained(name)
    dataset = load_dataset("csv", data_files=data, split="train").rename_column("label", "labels")
    dataset = dataset.map(lambda rows: tokenizer(rows["text"]), batched=True, remove_columns="text")
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(set(dataset["labels"])))

    part = dataset.shard(accelerator.num_processes, accelerator.process_index)  # each process counts its own
    counts = sum(gather_object([lv.count_tokens(part)]))
    lv.shrink_(model, lv.PartialVocabulary.from_counts(counts, tokenizer=tokenizer, model=model))

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)  # after shrinking
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, collate_fn=DataCollatorWithPadding(tokenizer))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_model(model, output)  # the full vocabulary


if __name__ == "__main__":
    main(*sys.argv[1:])
