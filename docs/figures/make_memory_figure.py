"""Draws docs/figures/memory.svg, the figure of the README: `make figures`.

Kept rows were counted on the three splits of SST-2 with each model's own tokenizer, special ids included:
`leanvocab count SST-2 --tokenizer MODEL`. Configs have the published shapes, so that nothing has to be downloaded.
"""

from pathlib import Path

import transformers

import leanvocab as lv
from leanvocab.reports.plots import plot_memory

_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_ROBERTA = {**_BASE, "max_position_embeddings": 514, "type_vocab_size": 1}
_DEBERTA_V3 = {
    **_BASE,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
}
# Label → config, rows kept.
MODELS = {
    "RoBERTa": (transformers.RobertaConfig(vocab_size=50_265, **_ROBERTA), 15_783),
    "DeBERTaV3": (transformers.DebertaV2Config(vocab_size=128_100, **_DEBERTA_V3), 15_990),
    "mBERT": (transformers.BertConfig(vocab_size=119_547, **_BASE), 9_743),
    "XLM-R": (transformers.XLMRobertaConfig(vocab_size=250_002, **_ROBERTA), 9_366),
}


def main() -> None:
    """Writes the figure beside this script."""
    estimates = {
        label: lv.estimate_memory(config, kept_rows, precision="fp32") for label, (config, kept_rows) in MODELS.items()
    }
    print(plot_memory(estimates, Path(__file__).with_name("memory.svg")))


if __name__ == "__main__":
    main()
