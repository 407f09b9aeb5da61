"""The same without the Trainer: any loop works, since the checks and the saving live in torch's own hooks.

python examples/plain_loop.py MODEL DATA.csv OUTPUT        (columns text and label)
"""

import sys

import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import leanvocab as lv


def main(name: str, data: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    dataset = load_dataset("csv", data_files=data, split="train").rename_column("label", "labels")
    dataset = dataset.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=128), batched=True)
    vocabulary = lv.PartialVocabulary.from_counts(lv.count_tokens(dataset, "input_ids"), tokenizer=tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(set(dataset["labels"])))

    with lv.shrunk(model, vocabulary):  # full again after the block, even where training raises
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)
        loader = DataLoader(
            dataset.remove_columns("text"), 32, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer)
        )
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    lv.save_full(model, output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
