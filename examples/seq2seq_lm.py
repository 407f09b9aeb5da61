"""A sequence-to-sequence language model: targets are looked up and predicted, so that labels are counted too.

python examples/seq2seq_lm.py MODEL DATA.csv OUTPUT        (columns source and target)
"""

import sys

from datasets import load_dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

import leanvocab as lv


def main(name: str, data: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSeq2SeqLM.from_pretrained(name)
    dataset = load_dataset("csv", data_files=data, split="train")
    dataset = dataset.map(
        lambda rows: tokenizer(rows["source"], text_target=rows["target"], truncation=True, max_length=128),
        batched=True,
    )
    counts = lv.count_tokens(dataset, ["input_ids", "labels"])
    vocabulary = lv.PartialVocabulary.from_counts(counts, tokenizer=tokenizer, model=model)
    lv.shrink_(model, vocabulary)
    arguments = Seq2SeqTrainingArguments(output, learning_rate=1e-4, save_strategy="no", report_to="none")
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)  # the model shifts the labels into the decoder
    trainer = Seq2SeqTrainer(model, arguments, collator, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(output)
    print(f"trained {len(vocabulary):,} of {vocabulary.full_size:,} rows, output={lv.status(model).output!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
