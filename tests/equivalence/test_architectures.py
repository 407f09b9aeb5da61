"""Every pair of architecture and text task that transformers maps: shrinking changes nothing but a table's size."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
from comparing import differing, same_bits
from tiny_models import AUTO_CLASSES, MARKS, PAIRS, TABLES, UNBUILDABLE, Pair, build_or_reason, vocabularies
from training import check_files, check_outputs, check_refusal, check_same, check_training, outputs

from leanvocab.errors import BypassError, LeanVocabError, ModelError, TiedOutputError
from leanvocab.model.shrink import merge_, shrink_

pytestmark = MARKS

# Pairs that leanvocab refuses: I-BERT's table is no torch.nn.Embedding, and is quantized by the largest value of all rows;
# Perceiver's decoder multiplies by the transposed table, around the lookup.
REFUSED: dict[str, tuple[type[LeanVocabError], str]] = {
    "ibert-sequence-classification": (ModelError, "QuantEmbedding|does not say which table"),
    "ibert-masked-lm": (ModelError, "QuantEmbedding|does not say which table"),
    "perceiver-masked-lm": (BypassError, r"PerceiverEmbeddingDecoder.forward calls transpose on the weight"),
}


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_shrunk_model_computes_trains_saves_and_merges_as_the_full_one(
    pair: Pair, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    tiny = build_or_reason(pair)
    if isinstance(tiny, str):
        pytest.skip(f"not built: {tiny}")
    full, inputs = tiny.model, tiny.inputs
    lean = copy.deepcopy(full)
    if str(pair) in REFUSED:
        check_refusal(tiny, lean, *REFUSED[str(pair)])
        record_property("refused", REFUSED[str(pair)][0].__name__)
        return
    shrink_(lean, vocabularies(tiny))

    for mode in (True, False):
        check_outputs(full.train(mode), lean.train(mode), inputs)
    has_dropout = not all(map(same_bits, outputs(full.train(), inputs, seed=7), outputs(full, inputs, seed=8)))
    equal_norms = check_training(full.train(), lean.train(), inputs)
    assert differing(full.state_dict(), lean.state_dict()) == []
    check_files(full, lean, tmp_path)

    merge_(lean)
    check_same(full, lean)
    record_property("equal_norms", equal_norms)
    record_property("dropout", [has_dropout])


def test_a_bound_on_what_cannot_be_built() -> None:
    # 172 pairs could be built by a plain sweep over transformers 5.23, which maps 404.
    can_be_built = [pair for pair in PAIRS if str(pair) not in UNBUILDABLE]
    assert len(can_be_built) >= min(172, len(PAIRS) * 172 / 404)


@pytest.mark.parametrize("task", [task for task in AUTO_CLASSES if task != "sequence-classification"])
def test_a_model_whose_output_layer_is_tied_is_refused_and_left_alone(
    task: str, record_property: Callable[[str, object], None]
) -> None:
    num_refused, wrong = 0, []
    for pair in PAIRS:
        if pair.task != task or str(pair) in REFUSED:
            continue
        if pair.model_type == "dbrx" or pair.model_type in TABLES:
            continue  # a config that refuses ties; tables that `vocabularies` names one by one
        tiny = build_or_reason(pair, tied=True)
        if isinstance(tiny, str):
            continue
        table = tiny.model.get_input_embeddings().weight
        if not any(layer.weight is table for layer in tiny_models.tied_layers(tiny.model)):
            continue
        before = copy.deepcopy(tiny.model)
        try:
            shrink_(tiny.model, vocabularies(tiny), output="full")
            wrong.append(f"{pair}: shrunk")
        except TiedOutputError:
            num_refused += 1
            check_same(before, tiny.model)
    record_property("tied", f"{num_refused} of {task}")
    assert wrong == []
    assert num_refused > 10
