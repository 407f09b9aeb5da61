"""Which models gain, into docs/models.md: what fine-tuning thirty models holds, with all rows, with 5,000 and with 20,000.

The configs are those of model_configs.json. The bytes are `estimate_memory`'s, asked as `leanvocab estimate` asks: AdamW on fp32
weights, and with `--qlora`. A test computes some lines again, and all of them where slow tests run.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs.figures.make_calculator import MODELS, estimate_arguments
from docs.figures.written_between import write_between

PAGE = Path(__file__).parents[1] / "models.md"
END = "<!-- end of what was drawn -->\n"
ROWS = (5_000, 20_000)
TABLES = {"classification": "encoders", "causal-lm": "language models", "seq2seq-lm": "encoder-decoders"}
METHODS = {"all": "all weights", "qlora": "QLoRA"}


def models_of(table: str) -> list[str]:
    """Names of a table's models; speech stands with the encoder-decoders."""
    return [name for name, entry in MODELS.items() if entry["task"].replace("speech", "seq2seq-lm") == table]


def row(name: str, method: str) -> str:
    """A line of a table; the first table of a task says what the models are."""
    from leanvocab.reports.memory_estimate import format_bytes, format_ratio

    estimates = list(_estimates(name, method))
    full = estimates[0].full
    cells = [f"[{name.rpartition('/')[2]}](https://huggingface.co/{name})"]
    if method == "all":
        share = format_ratio(full.num_vocabulary_parameters / full.num_parameters)
        cells += [f"{estimates[0].tables[0].full_rows:,}", f"{share} of {full.num_parameters / 1e6:,.0f} M"]
    cells.append(format_bytes(full.total_bytes))
    cells += [f"{format_bytes(its.partial.total_bytes)} (− {format_ratio(its.saved_ratio)})" for its in estimates]
    return f"| {' | '.join(cells)} |"


def _estimates(name: str, method: str) -> Iterator[Any]:
    import leanvocab as lv

    for rows in ROWS:
        config, arguments = estimate_arguments(name, method, "fp32")
        yield lv.estimate_memory(config, rows, **arguments)


def drawn(table: str, method: str) -> str:
    """What stands between the marks of a table."""
    sizes = ["rows of the vocabulary", "of all parameters"] if method == "all" else []
    head = [f"{METHODS[method]}", *sizes, "full", *(f"{rows:,} rows" for rows in ROWS)]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join([*lines, *(row(name, method) for name in models_of(table))]) + "\n"


def main() -> None:
    """Writes the tables into the page."""
    for table, title in TABLES.items():
        for method, way in METHODS.items():
            begin = f"<!-- {title}, {way}, drawn by docs/figures/draw_models.py -->\n"
            write_between(PAGE, begin, drawn(table, method), END)


if __name__ == "__main__":
    main()
