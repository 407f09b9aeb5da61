"""What fine-tuning multilingual encoders holds, full beside partial, into docs/multilingual-embeddings.md.

Numbers of configs are those of config.json at huggingface.co/NAME (read in November 2026); nothing is fetched. The bytes are
`estimate_memory`'s, for AdamW in fp32, and a test computes them again.
"""

from pathlib import Path
from typing import Any

from docs.figures.written_between import write_between

PAGE = Path(__file__).parents[1] / "multilingual-embeddings.md"
BEGIN, END = "<!-- drawn by docs/figures/draw_encoders.py -->\n", "<!-- end of what was drawn -->\n"
ONE_LANGUAGE, SEVEN_LANGUAGES = 10_000, 42_014  # rows that XNLI's texts use of XLM-R's vocabulary

_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 1536}
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_XLM_R = {"vocab_size": 250_002, "max_position_embeddings": 514, "type_vocab_size": 1}
_DISTILBERT = {"vocab_size": 119_547, "dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072}
_MODERNBERT = {**_BASE, "vocab_size": 256_000, "num_hidden_layers": 22, "intermediate_size": 1152, "pad_token_id": 0}
_GEMMA = {
    "vocab_size": 262_144, "hidden_size": 768, "num_hidden_layers": 24, "intermediate_size": 1152, "head_dim": 256,
    "num_attention_heads": 3, "num_key_value_heads": 1,
}  # fmt: skip
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "intfloat/multilingual-e5-small": ("BertConfig", {**_SMALL, "vocab_size": 250_037}),
    "intfloat/multilingual-e5-base": ("XLMRobertaConfig", {**_BASE, **_XLM_R}),
    "intfloat/multilingual-e5-large": ("XLMRobertaConfig", {**_LARGE, **_XLM_R}),
    "BAAI/bge-m3": ("XLMRobertaConfig", {**_LARGE, **_XLM_R, "max_position_embeddings": 8194}),
    "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2": ("BertConfig", {**_SMALL, "vocab_size": 250_037}),
    "sentence-transformers/paraphrase-multilingual-mpnet-base-v2": ("XLMRobertaConfig", {**_BASE, **_XLM_R}),
    "sentence-transformers/LaBSE": ("BertConfig", {**_BASE, "vocab_size": 501_153}),
    "sentence-transformers/distiluse-base-multilingual-cased-v2": ("DistilBertConfig", _DISTILBERT),
    "google/embeddinggemma-300m": ("Gemma3TextConfig", _GEMMA),
    "jhu-clsp/mmBERT-base": ("ModernBertConfig", _MODERNBERT),
    "FacebookAI/xlm-roberta-base": ("XLMRobertaConfig", {**_BASE, **_XLM_R}),
    "FacebookAI/xlm-roberta-large": ("XLMRobertaConfig", {**_LARGE, **_XLM_R}),
}


def row(name: str) -> str:
    """A line of the table."""
    import transformers

    import leanvocab as lv
    from leanvocab.reports.memory_estimate import format_bytes, format_ratio

    kind, numbers = ENCODERS[name]
    config = getattr(transformers, kind)(**numbers)
    one, seven = (
        lv.estimate_memory(config, rows, auto_class="AutoModel", precision="fp32")
        for rows in (ONE_LANGUAGE, SEVEN_LANGUAGES)
    )
    full = one.full
    share = format_ratio(full.num_vocabulary_parameters / full.num_parameters)
    cells = [f"[{name.rpartition('/')[2]}](https://huggingface.co/{name})", f"{full.num_parameters / 1e6:.0f} M", share]
    cells.append(format_bytes(full.total_bytes))
    cells += [f"{format_bytes(each.partial.total_bytes)} (− {format_ratio(each.saved_ratio)})" for each in (one, seven)]
    cells.append({(True, True): "both", (False, True): "partial alone"}[tuple(seven.cards[8].values())])
    return f"| {' | '.join(cells)} |"


def drawn() -> str:
    """What stands between the marks in the page."""
    head = [
        "encoder",
        "parameters",
        "of them vocabulary",
        "full",
        f"{ONE_LANGUAGE:,} rows",
        f"{SEVEN_LANGUAGES:,} rows",
        "fits 8 GB",
    ]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1), *map(row, ENCODERS)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the table into the page."""
    write_between(PAGE, BEGIN, drawn(), END)


if __name__ == "__main__":
    main()
