"""Sentence embeddings with sentence-transformers, trained on pairs of texts that belong together.

python examples/sentence_embeddings.py MODEL DATA.csv OUTPUT        (columns anchor and positive)
"""

import sys

from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss

import leanvocab as lv


def main(name: str, data: str, output: str) -> None:
    model = SentenceTransformer(name)
    dataset = load_dataset("csv", data_files=data, split="train")

    counts = lv.count_tokens(model.tokenizer([*dataset["anchor"], *dataset["positive"]])["input_ids"])
    lv.shrink_(model, lv.PartialVocabulary.from_counts(counts, tokenizer=model.tokenizer, model=model[0].auto_model))

    arguments = SentenceTransformerTrainingArguments(output, num_train_epochs=1, save_strategy="no", report_to="none")
    loss = MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model, arguments, train_dataset=dataset, loss=loss).train()

    print(model.encode(["words that were never counted are served from the base"]).shape)
    model.save_pretrained(output)  # its own layout, with the full vocabulary
    print(f"trained {lv.status(model).tables[0].num_rows:,} of {lv.status(model).tables[0].full_size:,} rows")


if __name__ == "__main__":
    main(*sys.argv[1:])
