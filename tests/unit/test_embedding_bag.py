"""Bags over a partial vocabulary: the bits of the full bag, in every form of input, mode and option."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import leanvocab as lv
from leanvocab.errors import BypassError, LeanVocabWarning, MissingTokenError, ModelError, VocabularyError
from leanvocab.model.shrink import merge_, shrink_
from leanvocab.partial.embedding_bag import RemapEmbeddingBag
from leanvocab.reports.inventory import take_inventory
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary
from versions import hear_of_sparse_checks

hear_of_sparse_checks()

SIZE, DIM = 300, 24
KEPT = sorted(torch.randperm(SIZE, generator=torch.Generator().manual_seed(0))[:90].tolist())
VOCABULARY = PartialVocabulary(KEPT, SIZE)
OUTSIDE = sorted(set(range(SIZE)) - set(KEPT))
PADDING = KEPT[17]


class Texts(nn.Module):
    """A bag with a layer on top, as a classifier of texts has."""

    def __init__(self, **options: Any):
        super().__init__()
        self.bag = nn.EmbeddingBag(SIZE, DIM, **options)
        self.top = nn.Linear(DIM, 3)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        scores: Tensor = self.top(self.bag(*args, **kwargs))
        return scores


def made(**options: Any) -> Texts:
    torch.manual_seed(0)
    return Texts(**options)


def inputs(form: str, step: int = 0, ids: list[int] | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a bag, of the kept ids, some of them several times, with an empty bag among those with offsets."""
    generator = torch.Generator().manual_seed(step)
    of = torch.tensor(ids or KEPT)
    flat = of[torch.randint(0, len(of), (40,), generator=generator)]
    flat[:3] = PADDING
    weights = torch.rand(40, generator=generator)
    offsets = torch.tensor([0, 7, 7, 19, 31])
    ends = torch.tensor([0, 7, 7, 19, 31, 40])
    nested = torch.nested.nested_tensor_from_jagged(flat, ends)
    forms: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "1-D with offsets": ((flat, offsets), {}),
        "2-D": ((flat.view(8, 5),), {}),
        "int32": ((flat.int(), offsets.int()), {}),
        "int32 and int64 offsets": ((flat.int(), offsets), {}),
        "last offset": ((flat, ends), {}),
        "weights": ((flat, offsets, weights), {}),
        "weights of 2-D": ((flat.view(8, 5),), {"per_sample_weights": weights.view(8, 5)}),
        "nested": ((nested,), {}),
        "nothing": ((flat[:0], torch.zeros(2, dtype=torch.int64)), {}),
    }
    return forms[form]


def trained(model: nn.Module, form: str, optimizer: Any, ids: list[int] | None = None) -> list[Any]:
    """Losses, and gradients of what weights the samples, of five steps."""
    noted: list[Any] = []
    for step in range(5):
        args, kwargs = inputs(form, step, ids)
        weights = kwargs.get("per_sample_weights", args[2] if len(args) > 2 else None)
        if weights is not None:
            weights.requires_grad_()
        loss = model(*args, **kwargs).square().sum()
        loss.backward()
        noted += [loss.item(), None if weights is None else weights.grad.tolist()]
        optimizer.step()
        optimizer.zero_grad()
    return noted


def same(first: nn.Module, second: nn.Module) -> bool:
    own, others = first.state_dict(), second.state_dict()
    return own.keys() == others.keys() and all(
        torch.equal(own[name].view(torch.int32), others[name].view(torch.int32)) for name in own
    )


CASES = [
    ("1-D with offsets", {}),
    ("1-D with offsets", {"mode": "sum"}),
    ("1-D with offsets", {"mode": "max"}),
    ("2-D", {"mode": "sum"}),
    ("2-D", {"mode": "max", "padding_idx": PADDING}),
    ("2-D", {"padding_idx": PADDING}),
    ("int32", {}),
    ("int32 and int64 offsets", {"mode": "max"}),
    ("last offset", {"include_last_offset": True}),
    ("weights", {"mode": "sum"}),
    ("weights of 2-D", {"mode": "sum", "padding_idx": PADDING}),
    ("nested", {}),
    ("nothing", {}),
    ("1-D with offsets", {"sparse": True}),
    ("2-D", {"sparse": True, "mode": "sum", "padding_idx": PADDING}),
    ("2-D", {"scale_grad_by_freq": True}),
    ("2-D", {"max_norm": 2.0}),
    ("1-D with offsets", {"max_norm": 2.0, "mode": "max"}),
]


@pytest.mark.parametrize(("form", "options"), CASES)
def test_a_bag_trains_as_the_full_one_does_to_the_bit(form: str, options: dict[str, Any]) -> None:
    kind = torch.optim.SparseAdam if options.get("sparse") else torch.optim.Adam
    full, lean = made(**options), shrink_(made(**options), VOCABULARY, embedding="bag")
    assert isinstance(lean.bag, RemapEmbeddingBag)
    assert lean.bag.weight.shape == (len(VOCABULARY), DIM)
    of_bags = (kind([full.bag.weight], lr=1e-2), kind([lean.bag.weight], lr=1e-2))
    assert trained(full, form, of_bags[0]) == trained(lean, form, of_bags[1])
    assert same(full, lean)
    assert same(full, merge_(lean))
    assert type(lean.bag) is nn.EmbeddingBag


@pytest.mark.parametrize(("form", "options"), CASES)
def test_rows_outside_the_vocabulary_are_served_in_evaluation(form: str, options: dict[str, Any]) -> None:
    full, lean = made(**options).eval(), shrink_(made(**options), VOCABULARY, embedding="bag").eval()
    args, kwargs = inputs(form, ids=[*KEPT[:20], *OUTSIDE[:20]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeanVocabWarning)
        assert torch.equal(full(*args, **kwargs), lean(*args, **kwargs))
    assert (lv.status(lean).tables[0].num_served > 0) is (form != "nothing")


@pytest.mark.parametrize("form", ["1-D with offsets", "2-D", "nested"])
def test_an_id_outside_the_vocabulary_is_an_error_in_training_that_names_its_position(form: str) -> None:
    lean = shrink_(made(), VOCABULARY, embedding="bag")
    (ids, *others), kwargs = inputs(form)
    (ids.values() if ids.is_nested else ids.view(-1))[12] = OUTSIDE[0]
    where = r"\(2, 2\)" if form == "2-D" else "12"
    with pytest.raises(MissingTokenError, match=rf"bag: token .*{OUTSIDE[0]}.* at position {where} of the input"):
        lean(ids, *others, **kwargs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wrong", [-1, SIZE])
def test_what_is_no_token_id_is_an_error_in_every_mode(training: bool, wrong: int) -> None:
    lean = shrink_(made(), VOCABULARY, embedding="bag").train(training)
    with pytest.raises(MissingTokenError, match=rf"id {wrong} at position \(1, 0\) of the input is no token id"):
        lean(torch.tensor([[KEPT[0], KEPT[1]], [wrong, KEPT[2]]]))


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        *(("base", options) for options in ({}, {"mode": "max"}, {"sparse": True, "padding_idx": PADDING})),
        *(("frozen", options) for options in ({}, {"mode": "max"}, {"mode": "sum", "padding_idx": PADDING})),
    ],
)
def test_ids_that_are_served_while_training_do_not_train_and_all_else_does(
    policy: Any, options: dict[str, Any]
) -> None:
    ids = [*KEPT[5:20], *OUTSIDE[:20]]
    full, lean = made(**options), shrink_(made(**options), VOCABULARY, embedding="bag", on_missing=policy)
    is_outside = torch.ones(SIZE, 1, dtype=torch.bool).index_fill(0, torch.tensor(KEPT), False)

    def of_kept(gradient: Tensor) -> Tensor:
        if not gradient.is_sparse:
            return gradient.masked_fill(is_outside, 0)
        at, values = gradient._indices(), gradient._values()
        is_kept = ~is_outside[at[0], 0]
        return torch.sparse_coo_tensor(at[:, is_kept], values[is_kept], gradient.shape, check_invariants=False)

    full.bag.weight.register_hook(of_kept)
    kind = torch.optim.SparseAdam if options.get("sparse") else torch.optim.Adam
    optimizers = [kind([each.bag.weight], lr=1e-2) for each in (full, lean)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeanVocabWarning)
        assert trained(full, "2-D", optimizers[0], ids) == trained(lean, "2-D", optimizers[1], ids)
    assert same(full, lean)


@pytest.mark.parametrize(("form", "options"), CASES)
def test_a_bag_whose_vocabulary_grows_trains_as_the_full_one_does(form: str, options: dict[str, Any]) -> None:
    few = PartialVocabulary(sorted({PADDING, *KEPT[:9]}), SIZE)
    full, lean = made(**options), shrink_(made(**options), few, embedding="bag", on_missing="extend")
    kind = torch.optim.SparseAdam if options.get("sparse") else torch.optim.Adam
    optimizers = [kind([each.bag.weight], lr=1e-2) for each in (full, lean)]
    assert trained(full, form, optimizers[0]) == trained(lean, form, optimizers[1])
    assert same(full, lean)


def test_ids_that_a_device_notes_make_bags_nan_until_the_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    lean = shrink_(made(), VOCABULARY, embedding="bag")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    bags = lean.bag(torch.tensor([[KEPT[0]], [OUTSIDE[0]]]))
    assert bags.isnan().all()
    bags.sum().backward()
    monkeypatch.undo()
    with pytest.raises(MissingTokenError, match=f"{OUTSIDE[0]}.*flat position 1"):
        torch.optim.SGD(lean.parameters(), lr=0.1).step()


def test_a_bag_that_is_compiled_gives_the_bits_of_the_full_one() -> None:
    full, lean = made(mode="sum"), shrink_(made(mode="sum"), VOCABULARY, embedding="bag")
    args, _ = inputs("2-D")
    compiled = torch.compile(lean, backend="eager")
    assert torch.equal(full(*args), compiled(*args))


def test_a_copy_and_a_pickle_of_a_shrunk_bag_go_on_alike() -> None:
    lean = shrink_(made(), VOCABULARY, embedding="bag")
    args, _ = inputs("2-D")
    for again in (copy.deepcopy(lean), pickle.loads(pickle.dumps(lean))):
        assert torch.equal(again(*args), lean(*args))
        assert type(merge_(again).bag) is nn.EmbeddingBag


def test_a_bag_is_found_by_its_size_where_it_is_the_only_one() -> None:
    assert lv.status(shrink_(made(), VOCABULARY)).tables[0].paths == ("bag",)


def test_a_bag_tied_to_an_embedding_is_one_table_with_it() -> None:
    model = nn.ModuleDict({"bag": nn.EmbeddingBag(SIZE, DIM), "words": nn.Embedding(SIZE, DIM)})
    model["words"].weight = model["bag"].weight
    shrink_(model, VOCABULARY, embedding="bag")
    assert lv.status(model).tables[0].paths == ("bag", "words")


def test_an_id_that_is_skipped_and_not_kept_is_refused_before_anything_changes() -> None:
    model = made(padding_idx=OUTSIDE[0])
    with pytest.raises(
        VocabularyError, match=rf"bag: the bags skip the id {OUTSIDE[0]} .*always_keep=\[{OUTSIDE[0]}\]"
    ):
        shrink_(model, VOCABULARY, embedding="bag")
    assert type(model.bag) is nn.EmbeddingBag


def test_a_bag_with_a_lookup_of_its_own_is_refused() -> None:
    class Own(nn.EmbeddingBag):
        def forward(self, input: Tensor, offsets: Any = None, per_sample_weights: Any = None) -> Tensor:
            return nn.functional.embedding_bag(input, self.weight)

    model = made()
    model.bag = Own(SIZE, DIM)
    with pytest.raises(
        BypassError, match=r"bag: Own.forward looks rows up in the weight itself.*nn.EmbeddingBag.forward"
    ):
        shrink_(model, VOCABULARY, embedding="bag")


def test_a_bag_that_is_read_around_its_lookup_is_refused() -> None:
    class Around(Texts):
        def forward(self, ids: Tensor) -> Tensor:
            weight = self.bag._parameters["weight"]
            scores: Tensor = self.top(nn.functional.embedding_bag(ids, weight))
            return scores

    lean = shrink_(Around(), VOCABULARY, embedding="bag")
    with pytest.raises((BypassError, ModelError), match="embedding_bag on the weight of bag itself"):
        lean(torch.tensor([[KEPT[0]]]))


def test_estimate_inventory_and_status_know_a_bag() -> None:
    model = made()
    estimate = lv.estimate_memory(model, len(VOCABULARY), embedding="bag", optimizer="adamw")
    saved = (SIZE - len(VOCABULARY)) * DIM * 4
    assert estimate.full.weights_bytes - estimate.partial.weights_bytes == saved
    assert [(each.names, each.kind) for each in take_inventory(model, "bag").tensors] == [
        (("bag.weight",), "input table")
    ]
    assert lv.status(shrink_(model, VOCABULARY)).saved_bytes == saved


def test_a_delta_of_a_bag_is_merged_into_its_base(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = made()
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    lean = shrink_(model, VOCABULARY, embedding="bag")
    trained(lean, "2-D", torch.optim.Adam(lean.parameters(), lr=1e-2))
    lv.save_delta(lean, tmp_path / "delta", base=tmp_path / "base")
    lv.merge_checkpoint(base=tmp_path / "base", delta=tmp_path / "delta", output=tmp_path / "merged")
    merged, expected = load_file(tmp_path / "merged" / "model.safetensors"), lean.state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in merged)
    again = shrink_(made(), VOCABULARY, embedding="bag")
    lv.load_delta(again, tmp_path / "delta", base=tmp_path / "base")
    assert same(again, lean)
