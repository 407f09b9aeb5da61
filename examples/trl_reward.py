"""A reward model with TRL, from pairs of a chosen and a rejected answer.

python examples/trl_reward.py MODEL DATA.csv OUTPUT        (columns prompt, chosen and rejected)
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

import leanvocab as lv


def main(name: str, data: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1)
    dataset = load_dataset("csv", data_files=data, split="train")

    arguments = RewardConfig(output, num_train_epochs=1, save_strategy="no", report_to="none", bf16=False)
    trainer = RewardTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer)

    counts = lv.count_tokens(trainer.train_dataset)  # as the trainer made it: chosen_input_ids, rejected_input_ids
    lv.shrink_(model, lv.PartialVocabulary.from_counts(counts, tokenizer=tokenizer, model=model))

    trainer.train()
    trainer.save_model(output)  # the full vocabulary


if __name__ == "__main__":
    main(*sys.argv[1:])
