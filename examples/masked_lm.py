"""A masked language model by the front door of `leanvocab finetune`, which draws its random words from the kept tokens.

python examples/masked_lm.py MODEL DATA.csv OUTPUT        (column text)
"""

import sys

from leanvocab.finetune.job import finetune
from leanvocab.finetune.settings import FineTuneSettings


def main(name: str, data: str, output: str) -> None:
    settings = FineTuneSettings(
        task="masked-lm",
        max_length=128,
        masked_ratio=0.15,
        validation_ratio=0.2,
        epochs=1,
        save_strategy="no",
    )
    result = finetune(name, data, output, settings)
    assert result.vocabulary is not None
    print(f"trained {len(result.vocabulary):,} of {result.vocabulary.full_size:,} rows, output={result.output!r}")
    print(f"perplexity {result.scores['perplexity']:.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
