"""LoRA beside the trained rows of the input table: the adapter is a few megabytes, and loads on the full base.

python examples/lora.py MODEL DATA.csv OUTPUT        (columns text and label)
"""

import sys

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import leanvocab as lv


def main(name: str, data: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    dataset = load_dataset("csv", data_files=data, split="train")
    dataset = dataset.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=128), batched=True)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(set(dataset["label"])))

    lv.shrink_(model, lv.PartialVocabulary.from_counts(lv.count_tokens(dataset), tokenizer=tokenizer, model=model))
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))

    arguments = TrainingArguments(output, num_train_epochs=1, save_strategy="no", report_to="none")
    Trainer(model, arguments, train_dataset=dataset, processing_class=tokenizer).train()
    model.save_pretrained(output)  # the adapter alone
    print(f"saved {lv.status(model).saved_bytes:,} bytes of weights while training")


if __name__ == "__main__":
    main(*sys.argv[1:])
