"""DeepSpeed's ZeRO-3 over the processes of torchrun: shrink, then shard; what is gathered is saved as the whole model:
torchrun --nproc-per-node 2 examples/zero3.py MODEL DATA.csv OUTPUT        (columns text and label)
"""

import sys

import deepspeed
import torch
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import leanvocab as lv

SETTINGS = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def main(name: str, data: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    dataset = load_dataset("csv", data_files=data, split="train").rename_column("label", "labels")
    dataset = dataset.map(lambda rows: tokenizer(rows["text"]), batched=True, remove_columns="text")
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(set(dataset["labels"])))
    lv.shrink_(model, lv.PartialVocabulary.from_counts(lv.count_tokens(dataset), tokenizer=tokenizer, model=model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=SETTINGS)
    for batch in engine.deepspeed_io(dataset, collate_fn=DataCollatorWithPadding(tokenizer)):
        engine.backward(engine(**batch.to(engine.device)).loss)
        engine.step()
    gathered = engine._zero3_consolidated_16bit_state_dict()  # as accelerate's get_state_dict has it
    if engine.global_rank == 0:
        model.save_pretrained(output, state_dict=gathered)  # the full vocabulary


if __name__ == "__main__":
    main(*sys.argv[1:])
