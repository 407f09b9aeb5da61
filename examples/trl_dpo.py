"""Direct preference optimization with TRL; the reference model is shrunk too, and both share the rows on disk.

python examples/trl_dpo.py MODEL DATA.csv OUTPUT        (columns prompt, chosen and rejected)
"""

import copy
import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import leanvocab as lv


def main(name: str, data: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    dataset = load_dataset("csv", data_files=data, split="train")

    texts = [text for column in ("prompt", "chosen", "rejected") for text in dataset[column]]
    counts = lv.count_tokens(tokenizer(texts)["input_ids"])
    lv.shrink_(model, lv.PartialVocabulary.from_counts(counts, tokenizer=tokenizer, model=model))

    arguments = DPOConfig(output, num_train_epochs=1, save_strategy="no", report_to="none", bf16=False)
    reference = copy.deepcopy(model)
    trainer = DPOTrainer(model, reference, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(output)  # the full vocabulary
    table = lv.status(model).tables[0]
    print(f"trained {table.num_rows:,} of {table.full_size:,} rows, output={lv.status(model).output!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
