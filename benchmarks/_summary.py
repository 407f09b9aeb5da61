"""docs/results.md: performance on one page that a person reads. Each sentence takes its figure from a result file."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks._results import Figure, Result
from benchmarks._tables import quantity, where_a_peer_is_better

_HEAD = """\
# Performance, in short

What leanvocab saves and costs, measured beside what people use today, on the same work, in the same run. Each figure is from
`python -m benchmarks NAME`, on a CPU with two cores; [every table](performance.md) has the machine, the rounds and the peers.

What a model saves is arithmetic, not a measurement: [models](models.md), [calculator](calculator.md), or `leanvocab estimate`.
"""


@dataclass(frozen=True)
class Headline:
    """A sentence about one figure, whose value `{}` takes."""

    benchmark: str
    what: str  # of the figure
    sentence: str
    title: str = ""  # in the result's title, where a benchmark has several


# fmt: off
_ABOUT = {
    "Memory of a step": (
        Headline(
            "language_step",
            "leanvocab, frozen: peak / the leanest full step's",
            "Gemma 3 270M with 5,000 rows kept trains with {} of the leanest full step's peak.",
            "gemma-3-270m",
        ),
        Headline(
            "language_step",
            "leanvocab, frozen: peak / the leanest full step's",
            "SmolLM2-135M with 5,000 rows kept trains with {} of the leanest full step's peak.",
            "smollm2-135m",
        ),
        Headline(
            "new_tokens",
            "those bytes / what the peak is lower by",
            "Ten new tokens of SmolLM2-135M: the peak is below that of PEFT's trainable tokens by every dense tensor that these hold.",
        ),
        Headline("per_layer_tables", "the whole: what is left", "Gemma 4 E2B with 5,000 rows: {} of all bytes in training are left."),
    ),
    "Time of a step": (
        Headline("training_step", "leanvocab / full, median of the pairs' ratios", "A step of XLM-R base takes {} of the full model's.", "xlm-r-base"),
        Headline(
            "training_step",
            "the ratio's 95 % interval reaches down to",
            "Where nine tenths of BERT's rows are kept, and nothing is to be gained, the ratio's interval begins at {}.",
            "bert-qqp",
        ),
        Headline("growing", "the ratio's 95 % interval reaches down to", "A vocabulary that may grow costs nothing while it does not: the interval begins at {}."),
        Headline("new_tokens", "step / PEFT's", "A step that trains ten new tokens takes {} of PEFT's."),
    ),
    "Before and after training": (
        Headline("text_counting", "time / encode_batch_fast on all cores + np.bincount, xlm-roberta-base", "Counting texts takes {} of tokenizing them in batches (XLM-R)."),
        Headline("text_counting", "time / transformer-smaller-training-vocab, xlm-roberta-base", "… and {} of what transformer-smaller-training-vocab takes."),
        Headline("counting", "time / the authors' code, 10⁹ tokens, equal", "Counting a billion token ids takes {} of what the authors' code takes."),
        Headline("shrinking", "xlm-r-large: shrinking, slowest round", "Shrinking XLM-R large takes at most {}.", "xlm-r-large"),
        Headline("shrinking", "xlm-r-base: shrink + state dict + merge, time / the authors' code", "Shrinking, saving and merging XLM-R base takes {} of the authors' code.", "xlm-r-base"),
        Headline("shrinking", "xlm-r-large: save, time / the full model, never shrunk", "Saving XLM-R large in full takes {} of an ordinary save.", "xlm-r-large"),
        Headline("merge", "merge with --verify: anonymous memory", "Merging a delta on disk, checked, holds {} of memory."),
        Headline("startup", "leanvocab --help, more than the empty app", "`leanvocab --help` takes {} more than an empty program."),
    ),
}
# fmt: on


def render_summary(results: Sequence[Result]) -> str:
    """The whole page; raises `LookupError` where a sentence has no figure."""
    parts = [_HEAD]
    for heading, headlines in _ABOUT.items():
        parts.append(f"## {heading}\n")
        parts.append("".join(f"- {_said(headline, results)}\n" for headline in headlines))
    bars = [(result, figure) for result in results for figure in result.figures if figure.bar is not None]
    short = [f"- {result.title}: {figure.what}: {_at_most(figure)}.\n" for result, figure in bars if not figure.holds]
    parts.append("## What falls short\n")
    parts.append(f"Of {len(bars)} bars that the project has set itself {len(bars) - len(short)} hold. These do not:\n")
    parts.append("".join(short))
    parts.append("## Where a peer is better\n")
    parts.append(
        "By more than 2 %; programs that do less work are in the list too. [The ratios](performance.md#where-a-peer-is-better).\n"
    )
    parts.append("".join(f"- {line}\n" for line in _better(results)) or "Nowhere in these results.\n")
    return "\n".join(parts)


def _said(headline: Headline, results: Iterable[Result]) -> str:
    for result in results:
        if result.benchmark == headline.benchmark and headline.title in result.title:
            for figure in result.figures:
                if figure.what.startswith(headline.what):
                    return f"{headline.sentence.format(_for_readers(figure))} [{result.benchmark}](performance.md#{result.benchmark})"
    raise LookupError(f"{headline.benchmark}: no figure {headline.what!r} with {headline.title!r} in its title")


def _for_readers(figure: Figure) -> str:
    """A share in per cent, whatever else in its unit."""
    if figure.unit in ("", "×"):
        return f"{100 * figure.value:.{0 if figure.value >= 0.1 else 1}f} %"
    return quantity(figure.value, figure.unit)


def _at_most(figure: Figure) -> str:
    assert figure.bar is not None
    return f"{quantity(figure.value, figure.unit)}, at most {quantity(figure.bar, figure.unit)} was meant"


def _better(results: Iterable[Result]) -> list[str]:
    found: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for measure, who, _ in where_a_peer_is_better(result.series):
            found.setdefault((result.title, who), []).append(measure)
    return [f"{title}: {who} ({', '.join(measures)})" for (title, who), measures in found.items()]
