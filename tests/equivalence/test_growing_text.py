"""Thirty steps of real text, growing from special ids alone: equal to the run that had all rows, bit for bit."""

from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import transformers
from growing_runs import OPTIMIZERS, adamw, check_same, steps_of
from torch import Tensor, tensor
from transformers import AutoTokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 2,
}  # fmt: skip
pytestmark = [
    pytest.mark.shared_data,
    pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not beside the project"),
]


@pytest.fixture(scope="module")
def batches() -> dict[str, list[dict[str, Tensor]]]:
    """Thirty batches of SST-2 and of two languages of XNLI, each by its own tokenizer."""
    made = {}
    for name, file, column in (
        ("bert-base-uncased", "glue/sst2.train.parquet", "sentence"),
        ("xlm-roberta-base", "xnli/xnli.de.validation.parquet", "premise"),
    ):
        tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)
        rows = pyarrow.parquet.read_table(SHARED / file).slice(0, 240).to_pydict()
        made[name] = [
            {
                **tokenizer(rows[column][at : at + 8], padding=True, return_tensors="pt"),
                "labels": tensor([label % 2 for label in rows["label"][at : at + 8]]),
            }
            for at in range(0, 240, 8)
        ]
    return made


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_sst2(make: Any, batches: Any) -> None:
    config = transformers.BertConfig(vocab_size=30_522, **SMALL)
    model = transformers.BertForSequenceClassification(config)
    check_same(model, steps_of(30, lambda each, step: each(**batches["bert-base-uncased"][step]).loss), make)


def test_xnli_with_its_large_vocabulary(batches: Any) -> None:
    config = transformers.XLMRobertaConfig(vocab_size=250_002, pad_token_id=1, max_position_embeddings=514, **SMALL)
    model = transformers.XLMRobertaForSequenceClassification(config)
    check_same(model, steps_of(30, lambda each, step: each(**batches["xlm-roberta-base"][step]).loss), adamw)


def test_a_decoder_whose_output_layer_stays_whole(batches: Any) -> None:
    names = {key: value for key, value in SMALL.items() if key != "num_labels"}
    config = transformers.LlamaConfig(vocab_size=30_522, tie_word_embeddings=False, **names)
    model = transformers.LlamaForCausalLM(config)

    def loss_of(each: Any, step: int) -> Tensor:
        batch = batches["bert-base-uncased"][step]
        return each(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss  # type: ignore[no-any-return]

    check_same(model, steps_of(30, loss_of), adamw, output="full")
