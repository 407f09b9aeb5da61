"""AdamW in 8 bits (bitsandbytes) through the Trainer, which keeps the states of embeddings in 32: fewer rows, fewer of those.

python examples/eight_bit_adam.py MODEL DATA.csv OUTPUT        (columns text and label)
"""

import sys

import transformers as hf
from datasets import load_dataset

import leanvocab as lv


def main(name: str, data: str, output: str) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(name)
    dataset = load_dataset("csv", data_files=data, split="train")
    dataset = dataset.map(lambda rows: tokenizer(rows["text"]), batched=True, remove_columns="text")
    model = hf.AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(set(dataset["label"])))

    lv.shrink_(model, lv.PartialVocabulary.from_counts(lv.count_tokens(dataset), tokenizer=tokenizer, model=model))

    arguments = hf.TrainingArguments(
        output,
        num_train_epochs=1,
        optim="adamw_8bit",  # or paged_adamw_8bit, adafactor, lion_8bit, … : docs/composability.md
        save_strategy="no",
        report_to="none",
    )
    trainer = hf.Trainer(model, arguments, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(output)  # the full vocabulary


if __name__ == "__main__":
    main(*sys.argv[1:])
