"""A classifier with transformers' Trainer; leanvocab is the one line between model and Trainer.

python examples/trainer.py MODEL DATA.csv OUTPUT        (columns text and label)
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import leanvocab as lv


def main(name: str, data: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    dataset = load_dataset("csv", data_files=data, split="train")
    dataset = dataset.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=128), batched=True)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(set(dataset["label"])))

    lv.shrink_(model, lv.PartialVocabulary.from_counts(lv.count_tokens(dataset), tokenizer=tokenizer, model=model))

    arguments = TrainingArguments(output, num_train_epochs=1, save_strategy="no", report_to="none")
    trainer = Trainer(model, arguments, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(output)  # the full vocabulary: loads where leanvocab is not installed
    print(f"trained {lv.status(model).tables[0].num_rows:,} of {lv.status(model).tables[0].full_size:,} rows")


if __name__ == "__main__":
    main(*sys.argv[1:])
