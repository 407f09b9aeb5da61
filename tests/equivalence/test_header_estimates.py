"""An estimate from headers is the one of the model that is built, field by field, for every architecture; or there is none.

Each tiny model is saved to a folder as users have it. Where headers and text do not decide, the command builds the model: the
last test says for how many.
"""

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_models import AUTO_CLASSES, KNOWN_VERSION, MARKS, PAIRS, UNBUILDABLE, Pair, build_or_reason

from leanvocab.errors import LeanVocabError
from leanvocab.finetune.settings import FineTuneSettings
from leanvocab.reads.transformers_text import Unsure
from leanvocab.reports.header_estimate import estimate_from_headers
from leanvocab.reports.memory import estimate_memory
from versions import configs_stand_in_text

pytestmark = [*MARKS, configs_stand_in_text]
KEPT = 40
TASKS = {"sequence-classification": "classification"}
IN_EVERY_RUN = 20
# Architectures whose headers have to decide, tied as their configs say.
DECIDED = {
    *(
        "albert",
        "bart",
        "bert",
        "camembert",
        "distilbert",
        "electra",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "granite",
        "llama",
    ),
    *(
        "mbart",
        "mistral",
        "modernbert",
        "mpnet",
        "mt5",
        "olmo2",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "roberta",
        "t5",
    ),
    *("smollm3", "xlm-roberta"),
}

REFUSES_TIES = {"dbrx-causal-lm"}  # its config does

CASES = [
    (pair, tied)
    for pair in PAIRS
    if str(pair) not in UNBUILDABLE
    for tied in (True, False)
    if (tied or pair.task != "sequence-classification") and not (tied and str(pair) in REFUSES_TIES)
]
_SEEDED = random.Random(16).sample(range(len(CASES)), IN_EVERY_RUN)
_PARAMETERS = [
    pytest.param(
        *case, id=f"{case[0]}-{'tied' if case[1] else 'untied'}", marks=[] if i in _SEEDED else pytest.mark.slow
    )
    for i, case in enumerate(CASES)
]


def class_for(task: str) -> str:
    """The auto class of a task of the tiny models."""
    return FineTuneSettings(task=TASKS.get(task, task)).kind.auto_class


def answers(folder: Path, **options: Any) -> tuple[Any, Any]:
    """What headers say, or `Unsure`; and what the model says that is built, or why it is refused."""
    by_headers: Any
    try:
        by_headers = asdict(estimate_from_headers(folder, KEPT, **options))
    except Unsure as unsure:
        return unsure, None
    try:
        built: Any = asdict(estimate_memory(str(folder), KEPT, **options))
    except (LeanVocabError, ImportError) as error:
        built = error
    return by_headers, built


@pytest.mark.parametrize(("pair", "tied"), _PARAMETERS)
def test_headers_say_what_the_model_says_that_is_built(pair: Pair, tied: bool, tmp_path: Path) -> None:
    tiny = build_or_reason(pair, tied=tied)
    if isinstance(tiny, str):
        pytest.skip(f"not built: {tiny}")
    tiny.model.save_pretrained(tmp_path)
    own = {"auto_class": class_for(pair.task)}
    variants = [own | {"precision": "fp32"}, own | {"precision": "mixed", "optimizer": "sgd_momentum"}]
    if pair.task != "sequence-classification":
        variants += [
            own | {"precision": "bf16", "output": "restricted"},
            own | {"precision": "mixed", "frozen_rows": "host"},
        ]
    # As another class than the one that it was saved as: heads are new, or left aside.
    variants += [{"auto_class": class_for(task), "precision": "fp32"} for task in AUTO_CLASSES if task != pair.task]
    for options in variants:
        by_headers, built = answers(tmp_path, **options)
        if not isinstance(by_headers, Unsure):
            assert built == by_headers
        elif transformers.__version__.startswith(KNOWN_VERSION) and options == variants[0]:
            assert not (tied and pair.model_type in DECIDED), by_headers


@pytest.mark.slow
def test_headers_decide_most_architectures(tmp_path: Path) -> None:
    decided, asked = [], 0
    for pair, tied in CASES:
        tiny = build_or_reason(pair, tied=tied)
        if isinstance(tiny, str):
            continue
        folder = tmp_path / f"{pair}-{tied}"
        tiny.model.save_pretrained(folder)
        asked += 1
        try:
            estimate_from_headers(folder, KEPT, auto_class=class_for(pair.task), precision="fp32")
        except Unsure:
            continue
        decided.append(pair)
    print(f"{len(decided)} of {asked} by their headers; the others are built")
    assert len(decided) > asked / 2
