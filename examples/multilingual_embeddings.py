"""Multilingual embeddings on one small card: prompts, several widths, large batches by gradient caching.

python examples/multilingual_embeddings.py MODEL DATA.csv OUTPUT        (columns anchor and positive)
"""

import sys

from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
from sentence_transformers.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss

import leanvocab as lv

PROMPTS = {"anchor": "query: ", "positive": "passage: "}  # as e5 was trained


def main(name: str, data: str, output: str) -> None:
    model = SentenceTransformer(name)
    dataset = load_dataset("csv", data_files=data, split="train")

    texts = [PROMPTS[column] + text for column in PROMPTS for text in dataset[column]]
    counts = lv.count_tokens(model.tokenizer(texts)["input_ids"])
    lv.shrink_(model, lv.PartialVocabulary.from_counts(counts, tokenizer=model.tokenizer, model=model[0].auto_model))

    dim = model.get_embedding_dimension()
    loss = MatryoshkaLoss(
        model, CachedMultipleNegativesRankingLoss(model, mini_batch_size=16), [dim, dim // 2, dim // 4]
    )
    options = {"num_train_epochs": 1, "save_strategy": "no", "report_to": "none"}
    arguments = Arguments(output, per_device_train_batch_size=256, prompts=PROMPTS, **options)
    SentenceTransformerTrainer(model, arguments, train_dataset=dataset, loss=loss).train()

    print(model.encode(["words that were never counted are served from the base"], prompt="query: ").shape)
    model.save_pretrained(output)  # its own layout, with the full vocabulary
    print(lv.status(model))


if __name__ == "__main__":
    main(*sys.argv[1:])
