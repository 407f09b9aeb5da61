"""In a fresh process, in which leanvocab cannot be imported: is the merged model an ordinary one?

    python -I check_merged.py MERGED PRETRAINED TEXTS

Loads both with plain transformers, compares the input tables row by row, and predicts. Prints JSON.
"""

import csv
import json
import sys
from importlib.abc import MetaPathFinder
from typing import Any


class _Blocker(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "leanvocab":
            raise ModuleNotFoundError("leanvocab is not to be imported here", name=name)


def main(merged: str, pretrained: str, texts: str) -> None:
    sys.meta_path.insert(0, _Blocker())
    import logging as standard

    import torch

    for name in (
        "torchao",
        "torch.utils._pytree",
        "bitsandbytes.backends.cpu",
    ):  # in a development environment, of kernels
        standard.getLogger(name).setLevel(standard.ERROR)
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, problems = AutoModelForSequenceClassification.from_pretrained(merged, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    with open(texts, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    table = model.get_input_embeddings().weight
    base_table = AutoModel.from_pretrained(pretrained).get_input_embeddings().weight
    same = (table.view(torch.int32) == base_table.view(torch.int32)).all(dim=1)
    samples = [row["text"] for row in rows[:3]]
    with torch.no_grad():
        predicted = model.eval()(**tokenizer(samples, padding=True, return_tensors="pt")).logits.argmax(1).tolist()
    report = {
        "problems": {name: sorted(map(str, found)) for name, found in problems.items() if found},
        "full_rows": len(table),
        "changed_token_ids": (~same).nonzero().flatten().tolist(),
        "predictions": [
            {"text": row["text"], "label": row["label"], "predicted": model.config.id2label[number]}
            for row, number in zip(rows, predicted, strict=False)
        ],
        "leanvocab_loaded": any(name.partition(".")[0] == "leanvocab" for name in sys.modules),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
