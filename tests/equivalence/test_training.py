"""Ordinary training, shrunk beside full: every parameter of the merged model is the same, bit for bit.

Two things in torch depend on how many numbers a tensor has, and so on the size of a table; both are harmless where the
embedding's dimension is a multiple of 16, the widest vector of float32 that a processor has:

- Clipping by the global norm sums the squares of all gradients, and rows of zeros shift numbers to other lanes of the
  vectors that add them up, so that the last bits of the norm may differ. Nothing else differs: with the norm of the
  full run put in place of its own, the shrunk run is the same, bit for bit, with any dimension.
- Fused optimizers update the numbers that do not fill a last vector with other instructions, which may round them
  otherwise: the last numbers of the last kept row, up to 15. A vocabulary padded to a multiple of 16 rows that does not
  keep the last id has no such numbers.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from comparing import differing, same_bits
from naive import merge_naively, shrink_naively
from tiny_models import PAIRS, VOCAB_SIZE, Tiny
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from training import gradient_norm, seed_everything

from leanvocab.model.shrink import merge_, shrink_
from leanvocab.vocabulary.counts import count_tokens
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

NUM_STEPS = 20
MAX_GRAD_NORM = 1.0
LOSS_SCALE = 100.0  # so that gradients are long enough to be clipped
WIDEST_VECTOR = 16  # float32 numbers of AVX-512; AVX2 has 8, NEON 4

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda parameters: SGD(parameters, lr=1e-2),
    "SGD-momentum": lambda parameters: SGD(parameters, lr=1e-3, momentum=0.9),
    "SGD-nesterov": lambda parameters: SGD(parameters, lr=1e-3, momentum=0.9, nesterov=True),
    "Adam": lambda parameters: Adam(parameters, lr=1e-3),
    "Adam-amsgrad": lambda parameters: Adam(parameters, lr=1e-3, amsgrad=True),
    "AdamW-for-loop": lambda parameters: AdamW(parameters, lr=1e-3, weight_decay=0, foreach=False),
    "AdamW-foreach": lambda parameters: AdamW(parameters, lr=1e-3, weight_decay=0, foreach=True),
    "AdamW-fused": lambda parameters: AdamW(parameters, lr=1e-3, weight_decay=0, fused=True),
    "SGD-fused": lambda parameters: SGD(parameters, lr=1e-3, momentum=0.9, fused=True),
    "Adagrad-fused": lambda parameters: Adagrad(parameters, lr=1e-3, fused=True),
    "Adagrad": lambda parameters: Adagrad(parameters, lr=1e-3),
    "Adagrad-with-a-start": lambda parameters: Adagrad(parameters, lr=1e-3, initial_accumulator_value=0.1),
    "RMSprop": lambda parameters: RMSprop(parameters, lr=1e-3),
    "RMSprop-momentum-centered": lambda parameters: RMSprop(parameters, lr=1e-3, momentum=0.9, centered=True),
}
DIMENSIONS = {32: 4, 36: 4, 33: 3}  # of the embedding, with the number of heads
CLIPPING = {"clipped": MAX_GRAD_NORM, "unclipped": None}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("dim", DIMENSIONS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_twenty_steps_every_parameter_is_that_of_ordinary_training(
    name: str, dim: int, clipping: str, record_property: Callable[[str, object], None]
) -> None:
    tiny = build("bert-sequence-classification", {"hidden_size": dim, "num_attention_heads": DIMENSIONS[dim]})
    multiple = WIDEST_VECTOR if "fused" in name and dim % WIDEST_VECTOR else None
    compare(tiny, OPTIMIZERS[name], CLIPPING[clipping], record_property, pad_to_multiple_of=multiple)


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize(
    "pair", ["t5-seq2seq-lm", "gemma-causal-lm", "roberta-masked-lm", "bart-sequence-classification"]
)
def test_other_kinds_of_models_train_the_same(
    pair: str, clipping: str, record_property: Callable[[str, object], None]
) -> None:
    compare(build(pair), OPTIMIZERS["AdamW-fused"], CLIPPING[clipping], record_property)


@pytest.mark.parametrize(
    "pair",
    [
        "bert-masked-lm",  # a padding row, whose gradient is zero
        "mpnet-sequence-classification",  # a padding row of its own choice, which is not kept
        "gemma-causal-lm",  # rows are scaled
        "bart-seq2seq-lm",  # one table in encoder and decoder
        "gpt2-sequence-classification",  # pools at the last id that is no padding
        "esm-masked-lm",  # compares with the mask id
        "recurrent_gemma-causal-lm",  # bfloat16
    ],
)
def test_partial_rows_are_those_of_the_naive_version_after_every_step(pair: str) -> None:
    tiny = build(pair)
    batches = make_batches(tiny)
    vocabulary = vocabulary_of(tiny, batches)
    token_ids = torch.tensor(vocabulary.token_ids)
    lean, naive = copy.deepcopy(tiny.model), copy.deepcopy(tiny.model)
    shrink_(lean, vocabulary)
    rows = shrink_naively(naive, naive.get_input_embeddings(), token_ids)
    optimizers = [OPTIMIZERS["AdamW-foreach"](model.train().parameters()) for model in (lean, naive)]
    for step, batch in enumerate(batches[:5]):
        for model, optimizer in zip((lean, naive), optimizers, strict=True):
            seed_everything(step)
            model(**batch).loss.backward()
            optimizer.step()
        assert same_bits(lean.get_input_embeddings().weight.grad, rows.grad)
        assert same_bits(lean.get_input_embeddings().weight, rows)
        for optimizer in optimizers:
            optimizer.zero_grad()
    merge_(lean)
    before = tiny.model.get_input_embeddings().weight
    assert same_bits(lean.get_input_embeddings().weight, merge_naively(before, rows, token_ids))


def test_two_threads_train_the_same(record_property: Callable[[str, object], None]) -> None:
    torch.set_num_threads(2)
    try:
        compare(build("bert-sequence-classification"), OPTIMIZERS["AdamW-foreach"], MAX_GRAD_NORM, record_property)
    finally:
        torch.set_num_threads(1)


def test_the_comparison_sees_one_row_that_was_trained_wrongly() -> None:
    tiny = build("bert-sequence-classification")
    batches = make_batches(tiny)
    other = copy.deepcopy(tiny.model)
    for model in (tiny.model, other):
        train(model, batches, OPTIMIZERS["SGD"], None)
    assert differing(dict(tiny.model.named_parameters()), dict(other.named_parameters())) == []
    table = other.get_input_embeddings().weight
    row = int(batches[0]["input_ids"][0, 0])
    table.data[row, 0] = torch.nextafter(table.data[row, 0], torch.tensor(1.0))
    assert differing(dict(tiny.model.named_parameters()), dict(other.named_parameters())) == [
        "bert.embeddings.word_embeddings.weight"
    ]


@pytest.mark.parametrize("name", ["AdamW-fused", "SGD-fused", "Adagrad-fused"])
def test_a_fused_optimizer_may_round_the_last_numbers_of_an_odd_table_otherwise_and_no_others(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    dim, num_kept, num_runs = 33, 23, 100
    generator = torch.Generator().manual_seed(0)
    places: set[int] = set()
    for _ in range(num_runs):
        kept = torch.randperm(VOCAB_SIZE, generator=generator)[:num_kept].sort().values
        rows = torch.randn(VOCAB_SIZE, dim, generator=generator)
        full, partial = torch.nn.Parameter(rows), torch.nn.Parameter(rows[kept])
        optimizers = [OPTIMIZERS[name]([each]) for each in (full, partial)]
        for _ in range(5):
            partial.grad = torch.randn(num_kept, dim, generator=generator)
            full.grad = torch.zeros_like(full).index_copy_(0, kept, partial.grad)
            for optimizer in optimizers:
                optimizer.step()
        places |= set((full[kept] != partial).flatten().nonzero().flatten().tolist())
        torch.testing.assert_close(full[kept], partial, rtol=1e-5, atol=1e-7)
    record_property("fused_places", sorted(place - num_kept * dim for place in places))
    assert all(place >= num_kept * dim - num_kept * dim % WIDEST_VECTOR for place in places)


def build(pair: str, overrides: dict[str, Any] | None = None) -> Tiny:
    return tiny_models.build(next(each for each in PAIRS if str(each) == pair), overrides=overrides)


def compare(
    tiny: Tiny,
    optimizer: Callable[[Any], Optimizer],
    max_norm: float | None,
    record: Callable[..., None],
    pad_to_multiple_of: int | None = None,
) -> None:
    """Trains the full model and its shrunk copy on the same batches, merges, and compares every parameter."""
    batches = make_batches(tiny)
    full, lean = tiny.model, copy.deepcopy(tiny.model)
    shrink_(lean, vocabulary_of(tiny, batches, pad_to_multiple_of))
    losses, norms = train(full, batches, optimizer, max_norm)
    lean_losses, lean_norms = train(lean, batches, optimizer, max_norm, clip_by=norms)
    merge_(lean)

    dim = full.get_input_embeddings().embedding_dim
    assert np.isfinite(losses).all()
    assert len(set(losses)) == NUM_STEPS, "dropout and batches make every loss another one"
    assert lean_losses == losses
    assert differing(dict(full.named_parameters()), dict(lean.named_parameters())) == []
    if max_norm is not None:
        assert sum(norm > max_norm for norm in norms) >= NUM_STEPS // 2, "clipping was at work"
        record("norms", (dim % WIDEST_VECTOR == 0, list(zip(norms, lean_norms, strict=True))))
    if dim % WIDEST_VECTOR == 0:
        assert lean_norms == norms
    else:
        assert lean_norms == pytest.approx(norms, rel=1e-5)


def train(
    model: Any,
    batches: list[dict[str, Any]],
    make_optimizer: Callable[[Any], Optimizer],
    max_norm: float | None,
    clip_by: list[float] | None = None,
) -> tuple[list[float], list[float]]:
    """One step a batch, with dropout; losses, and norms before clipping, which `clip_by` replaces where clipping."""
    optimizer = make_optimizer(model.train().parameters())
    losses, norms = [], []
    for step, batch in enumerate(batches):
        seed_everything(step)
        loss = model(**batch).loss
        (loss * LOSS_SCALE).backward()
        if max_norm is not None:
            norms.append(gradient_norm(model))
            norm = clip_by[step] if clip_by is not None else norms[step]
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, torch.tensor(norm))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


def make_batches(tiny: Tiny) -> list[dict[str, Any]]:
    """As many batches as steps, each of other ids: rows that one batch leaves out go on moving by their momentum."""
    rng = np.random.default_rng(0)
    config = tiny.model.config.get_text_config()
    ids = sorted(set(tiny.inputs["input_ids"].unique().tolist()) - {config.pad_token_id, config.eos_token_id})
    batches = []
    for _ in range(NUM_STEPS):
        few = rng.choice(ids, size=len(ids) // 2, replace=False)
        replace = torch.arange(VOCAB_SIZE)
        replace[ids] = torch.from_numpy(rng.choice(few, size=len(ids)))
        batch = dict(tiny.inputs)
        for name in ("input_ids", "labels"):
            if batch[name].ndim > 1:
                mask = tiny.inputs["attention_mask"] == 1 if name == "input_ids" else batch[name] != -100
                batch[name] = torch.where(mask, replace[batch[name].clamp(min=0)], batch[name])
        batches.append(batch)
    return batches


def vocabulary_of(
    tiny: Tiny, batches: list[dict[str, Any]], pad_to_multiple_of: int | None = None
) -> PartialVocabulary:
    columns = ("input_ids", "labels")
    counts = [count_tokens({n: batch[n] for n in columns if batch[n].ndim > 1}) for batch in batches]
    vocabulary = PartialVocabulary.from_counts(
        sum(counts[1:], counts[0]), full_size=VOCAB_SIZE, model=tiny.model, pad_to_multiple_of=pad_to_multiple_of
    )
    assert len(vocabulary) < VOCAB_SIZE / 3
    assert np.mean(vocabulary.token_ids != np.arange(len(vocabulary))) > 0.5
    if pad_to_multiple_of is not None:
        assert VOCAB_SIZE - 1 not in vocabulary, "the full table's own last numbers are rounded otherwise too"
    return vocabulary
