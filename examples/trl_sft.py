"""Supervised fine-tuning with TRL; what its trainer made of the data (chat templates, ends of sequence) is what is counted.

python examples/trl_sft.py MODEL DATA.csv OUTPUT        (columns prompt and completion)
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import leanvocab as lv


def main(name: str, data: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    dataset = load_dataset("csv", data_files=data, split="train")

    arguments = SFTConfig(output, num_train_epochs=1, save_strategy="no", report_to="none", bf16=False)
    trainer = SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer)

    counts = lv.count_tokens(trainer.train_dataset)
    lv.shrink_(model, lv.PartialVocabulary.from_counts(counts, tokenizer=tokenizer, model=model))

    trainer.train()
    trainer.save_model(output)  # the full vocabulary
    table = lv.status(model).tables[0]
    print(f"trained {table.num_rows:,} of {table.full_size:,} rows, output={lv.status(model).output!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
