"""A causal language model with transformers' Trainer: its output layer knows the same rows as its input table.

python examples/causal_lm.py MODEL DATA.csv OUTPUT        (column text)
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import leanvocab as lv
from leanvocab.finetune.collators import PaddingCollator


def main(name: str, data: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    dataset = load_dataset("csv", data_files=data, split="train")

    def to_ids(rows: dict) -> dict:
        ids = tokenizer([text + tokenizer.eos_token for text in rows["text"]], truncation=True, max_length=512)
        return {"input_ids": ids["input_ids"], "labels": ids["input_ids"]}

    dataset = dataset.map(to_ids, batched=True, remove_columns=dataset.column_names)
    vocabulary = lv.PartialVocabulary.from_counts(lv.count_tokens(dataset), tokenizer=tokenizer, model=model)
    lv.shrink_(model, vocabulary)  # output="full" where the output layer is untied, "frozen" where it is tied

    arguments = TrainingArguments(output, learning_rate=2e-5, num_train_epochs=1, save_strategy="no", report_to="none")
    collator = PaddingCollator(
        tokenizer.eos_token_id
    )  # the ends that stand in the texts are learned, those that pad are not
    trainer = Trainer(model, arguments, collator, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(output)
    print(f"trained {len(vocabulary):,} of {vocabulary.full_size:,} rows, output={lv.status(model).output!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
