"""Fine-tune with the vocabulary shrunk, then keep it small for good: a folder with its own tokenizer that loads anywhere.

python examples/trim.py MODEL DATA.csv OUTPUT        (columns text and label)
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, pipeline

import leanvocab as lv


def main(name: str, data: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    texts = load_dataset("csv", data_files=data, split="train")
    dataset = texts.map(lambda row: tokenizer(row["text"], truncation=True), remove_columns="text")

    vocabulary = lv.PartialVocabulary.from_counts(lv.count_tokens(dataset), tokenizer=tokenizer, model=model)
    lv.shrink_(model, vocabulary)
    arguments = TrainingArguments(f"{output}.run", num_train_epochs=1, save_strategy="no", report_to="none")
    Trainer(model, arguments, train_dataset=dataset, processing_class=tokenizer).train()

    # What is to be read later decides what is kept: here whole scripts beside the words of the data.
    keep = lv.PartialVocabulary.from_counts(
        lv.count_tokens(dataset), tokenizer=tokenizer, model=model, keep_scripts=["Latin", "Common"]
    )
    result = lv.export_trimmed(model, keep, output, tokenizer=tokenizer)
    print(f"kept {result.rows_after:,} of {result.rows_before:,} rows")
    print(pipeline("text-classification", output)(texts["text"][0]))  # no leanvocab is needed from here on


if __name__ == "__main__":
    main(*sys.argv[1:])
