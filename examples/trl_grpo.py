"""GRPO with TRL: roll-outs may emit any id, also one that nobody counted; its row is read from the base.

python examples/trl_grpo.py MODEL DATA.csv OUTPUT        (column prompt)
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import leanvocab as lv


def brief(completions: list[str], **_: object) -> list[float]:
    return [-float(len(completion)) for completion in completions]


def main(name: str, data: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(name)
    dataset = load_dataset("csv", data_files=data, split="train")

    counts = lv.count_tokens(tokenizer(list(dataset["prompt"]))["input_ids"])
    vocabulary = lv.PartialVocabulary.from_counts(counts, tokenizer=tokenizer, model=model)
    lv.shrink_(model, vocabulary, on_missing="base")

    arguments = GRPOConfig(
        output, max_steps=2, num_generations=2, per_device_train_batch_size=2, max_completion_length=8,
        save_strategy="no", report_to="none", bf16=False,
    )  # fmt: skip
    trainer = GRPOTrainer(model, brief, arguments, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(output)  # the full vocabulary
    table = lv.status(model).tables[0]
    print(f"trained {table.num_rows:,} of {table.full_size:,} rows, output={lv.status(model).output!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
