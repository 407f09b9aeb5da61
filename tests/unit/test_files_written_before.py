"""Vocabularies, deltas and checkpoints that an earlier commit wrote are read as they were then (tests/data/before_the_wings)."""

import json
from pathlib import Path
from typing import Any

import leanvocab as lv

BEFORE = Path(__file__).parents[1] / "data" / "before_the_wings"
EXPECTED: dict[str, Any] = json.loads((BEFORE / "expected.json").read_text())
VOCABULARY = lv.PartialVocabulary([0, 1, 2, 5, 8, 13, 21, 34, 39], 40)
DELTAS = {  # → base
    "tied-frozen": "tied",
    "untied-full": "untied",
    "untied-frozen": "untied",
    "untied-restricted": "untied",
}
