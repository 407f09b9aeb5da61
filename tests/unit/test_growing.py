"""Rows that come while a model trains: the run that grows is the run that had all rows from the beginning, bit for bit."""

import copy
from collections.abc import Callable
from typing import Any

import accelerator
import pytest
import torch
from comparing import differing, same_bits
from growing_runs import OPTIMIZERS, adamw, check_same, steps_of
from models import FULL_SIZE, small_gemma3n, small_lm, small_model
from own_process import in_own_process
from references import QUIET, check_close, mask_gradients
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from transformers import Gemma3nForCausalLM

import leanvocab as lv
from leanvocab.model import growing
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

pytestmark = QUIET
ACCELERATOR = pytest.mark.skipif(not accelerator.can_be_emulated(), reason="torch can emulate a device from 2.13 on")
EVERYTHING = PartialVocabulary(range(FULL_SIZE), FULL_SIZE)


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "SMALLEST_BLOCK", 1)


def ids_of(step: int, *, shape: tuple[int, int] = (4, 8)) -> Tensor:
    """Ids of a step, of which each step brings further ones; the first ones are in all."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3 + 7 * step, 40 + 30 * step, shape, generator=generator)
    ids[:, 0], ids[:, 1] = 0, 40
    return ids


def of_classes(model: Any, step: int) -> Tensor:
    loss: Tensor = model(input_ids=ids_of(step), labels=torch.arange(4) % 3).loss
    return loss


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_each_optimizer_trains_as_if_all_rows_had_been_there(make: Any) -> None:
    check_same(small_model(), steps_of(6, of_classes), make)


@pytest.mark.parametrize("family", ["bert", "bart", "llama", "gpt2-untied", "llama-untied", "bart-untied"])
def test_each_kind_of_model_trains_as_if_all_rows_had_been_there(family: str) -> None:
    def loss_of(model: Any, step: int) -> Tensor:
        if family in ("bert", "bart", "llama"):
            ids = ids_of(step)
            ids[:, -1] = 2
            return model(input_ids=ids, labels=torch.arange(4) % 3).loss  # type: ignore[no-any-return]
        # A decoder's labels bring other ids in the second lookup of the graph.
        labels = ids_of(step + 3) if family.startswith("bart") else ids_of(step)
        return model(input_ids=ids_of(step), labels=labels).loss  # type: ignore[no-any-return]

    options = {"output": "full"} if "-" in family else {}
    check_same(small_model(family), steps_of(4, loss_of), **options)


def test_tables_for_each_layer_grow_beside_the_input_table() -> None:
    torch.manual_seed(0)
    config = small_gemma3n()
    config.tie_word_embeddings = False
    model = Gemma3nForCausalLM(config)

    def loss_of(each: Any, step: int) -> Tensor:
        ids = ids_of(step).clamp(min=3)  # the padding's row is zero, whose norm has no gradient
        return each(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

    grown = check_same(model, steps_of(3, loss_of), output="full")
    first, second = lv.status(grown).tables
    assert second.num_rows > 40
    assert first.num_rows > 40


def pooled(model: Any, ids: Tensor) -> Tensor:
    states: Tensor = model.roberta(input_ids=ids).last_hidden_state.mean(1)
    return states


def similar(first: Tensor, second: Tensor) -> Tensor:
    return nn.functional.cross_entropy(first @ second.T, torch.arange(len(first)))


def test_rows_come_in_the_second_and_third_lookup_of_one_graph() -> None:
    def loss_of(model: Any, step: int) -> Tensor:
        first, second, third = (pooled(model, ids_of(step + number)) for number in range(3))
        return similar(first, second) + similar(first, third)

    check_same(small_model(), steps_of(4, loss_of))


def test_rows_come_between_accumulated_batches_each_of_two_columns() -> None:
    def run(model: Any, optimizer: Optimizer) -> list[float]:
        model.train()
        torch.manual_seed(0)
        losses = []
        for step in range(3):
            for part in range(3):
                loss = similar(pooled(model, ids_of(2 * step + part)), pooled(model, ids_of(2 * step + part + 1)))
                loss.backward()
                losses.append(float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad(set_to_none=step != 1)
        return losses

    check_same(small_model(), run)


@pytest.mark.parametrize("in_order", [True, False])
def test_two_graphs_are_alive_when_rows_come(in_order: bool) -> None:
    def run(model: Any, optimizer: Optimizer) -> list[float]:
        model.train()
        torch.manual_seed(0)
        losses = [of_classes(model, step) for step in (0, 2, 4)]
        for loss in losses if in_order else losses[::-1]:
            loss.backward()
        optimizer.step()
        return [float(loss.detach()) for loss in losses]

    check_same(small_model(), run)


def test_gradcache() -> None:
    """Embeddings of chunks without a graph, a loss on all of them, then each chunk again with its part of the gradient."""

    def loss_of(model: Any, step: int) -> Tensor:
        chunks = [[ids_of(step + 2 * side + number) for number in range(2)] for side in range(2)]
        states = [torch.get_rng_state() for _ in range(4)]
        with torch.no_grad():
            sides = [torch.cat([pooled(model, ids) for ids in side]).requires_grad_() for side in chunks]
        loss = similar(*sides)
        loss.backward()
        for side, leaf in zip(chunks, sides, strict=True):
            assert leaf.grad is not None
            for ids, gradient in zip(side, leaf.grad.chunk(2), strict=True):
                torch.set_rng_state(states.pop())
                torch.dot(pooled(model, ids).flatten(), gradient.flatten()).backward()
        return loss.detach()

    check_same(small_model(), steps_of(3, loss_of))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_is_computed_again_in_the_backward_finds_its_rows(use_reentrant: bool) -> None:
    def loss_of(model: Any, step: int) -> Tensor:
        seed = torch.zeros(1, requires_grad=True)  # a reentrant checkpoint needs an input with a gradient

        def embedded(ids: Tensor, _: Tensor) -> Tensor:
            return pooled(model, ids)

        first, second = (
            checkpoint(embedded, ids_of(step + number), seed, use_reentrant=use_reentrant) for number in (0, 2)
        )
        return similar(first, second)

    check_same(small_model(), steps_of(3, loss_of))


def test_gradient_checkpointing_of_a_model() -> None:
    model = small_model("llama-untied")
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    check_same(
        model, steps_of(3, lambda each, step: each(input_ids=ids_of(step), labels=ids_of(step)).loss), output="full"
    )


def test_hooks_on_the_weight_get_the_gradient_once_and_of_all_rows() -> None:
    seen: list[tuple[str, Any]] = []

    def run(model: Any, optimizer: Optimizer) -> list[float]:
        weight = model.roberta.embeddings.word_embeddings.weight
        seen.append(("model", None))
        weight.register_hook(lambda gradient: seen.append(("hook", gradient.clone())) or gradient * 0.5)
        weight.register_post_accumulate_grad_hook(lambda each: seen.append(("after", float(each.grad.abs().sum()))))
        return steps_of(3, lambda each, step: similar(*(pooled(each, ids_of(step + n)) for n in (0, 2))))(
            model, optimizer
        )

    check_same(small_model(), run)
    runs: list[list[tuple[str, Any]]] = []
    for kind, value in seen:
        runs.append([]) if kind == "model" else runs[-1].append((kind, value))
    assert [kind for kind, _ in runs[0]] == ["hook", "after"] * 3
    for (_, one), (_, other) in zip(runs[0], runs[2], strict=True):
        assert torch.is_tensor(one) == torch.is_tensor(other)
        assert same_bits(one, other) if torch.is_tensor(one) else one == pytest.approx(other)


@pytest.mark.parametrize(
    "options",
    [
        {"max_norm": 1.0},
        {"padding_idx": 5},
        {"scale_grad_by_freq": True},
        {"sparse": True},
        {"padding_idx": 90, "sparse": True},
    ],
)
def test_options_of_a_lookup_hold_for_rows_of_before_and_after(options: dict[str, Any]) -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(FULL_SIZE, 8, **options)
            self.head = nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            output: Tensor = self.head(self.table(ids).mean(1))
            return output

    def loss_of(model: Any, step: int) -> Tensor:
        first, second = ids_of(step), ids_of(step + 2)
        first[:, 3], second[:, 3] = 5, 90
        return (model(first) * model(second)).sum()

    make = (lambda parameters: torch.optim.SGD(parameters, lr=0.1)) if options.get("sparse") else adamw
    check_same(Bag(), steps_of(4, loss_of), make, embedding="table")


def test_a_row_that_came_has_casts_and_decay_replayed() -> None:
    model = small_model()
    others = [copy.deepcopy(model)]
    lv.shrink_(model, on_missing="extend", decay_unused_rows=True)
    results = []
    for each in (model, *others):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2, weight_decay=0.1)
        each.bfloat16().float()
        results.append(steps_of(4, of_classes)(each, optimizer))
    assert results[0] == results[1]
    assert differing(model, others[0]) == []


def test_evaluation_serves_from_the_base_and_brings_no_rows() -> None:
    model = lv.shrink_(small_model(), on_missing="extend").eval()
    before = lv.status(model).tables[0].num_rows
    with pytest.warns(lv.errors.LeanVocabWarning, match="served from the base"):
        model(input_ids=ids_of(0))
    assert lv.status(model).tables[0].num_rows == before


def test_blocks_are_of_real_rows_and_come_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "SMALLEST_BLOCK", 100)
    model = check_same(small_model(), steps_of(5, of_classes))
    assert lv.status(model).tables[0].num_rows >= 100


@pytest.mark.parametrize("block", [1, 16])
def test_rare_ids_one_at_a_time_do_not_bring_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Of ids that come from the end, the first absent ones are never any: what is there beside them stays an eighth."""
    monkeypatch.setattr(growing, "SMALLEST_BLOCK", block)
    model = lv.shrink_(small_model(), on_missing="extend").train()
    start = lv.status(model).tables[0].num_rows
    for asked in range(1, 201):
        if asked == 100:
            model = copy.deepcopy(model)
        model(input_ids=torch.tensor([[0, FULL_SIZE - asked]]))
        others = lv.status(model).tables[0].num_rows - start - asked
        assert 0 <= others <= max(block, (start + asked) // 8)


def test_a_deep_copy_and_a_pickle_grow_on_their_own() -> None:
    import pickle

    model = lv.shrink_(small_model(), on_missing="extend")
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    before = lv.status(model).tables[0].num_rows
    for each in copies:
        steps_of(2, of_classes)(each, adamw(each.parameters()))
        assert lv.status(each).tables[0].num_rows > before
    assert lv.status(model).tables[0].num_rows == before
    assert differing(*copies) == []


def test_no_vocabulary_and_no_growth_is_an_error() -> None:
    with pytest.raises(lv.errors.VocabularyError, match=r'given no vocabulary: count the data.*on_missing="extend"'):
        lv.shrink_(small_model())


@pytest.mark.parametrize("options", [{"ids": "partial"}, {"output": "restricted"}])
def test_options_that_contradict_growth_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(lv.errors.ModelError, match="on_missing='extend'"):
        lv.shrink_(small_model("llama-untied"), on_missing="extend", **options)


def test_an_id_that_is_none_is_an_error() -> None:
    model = lv.shrink_(small_model(), on_missing="extend").train()
    with pytest.raises(lv.errors.MissingTokenError, match=r"id 500 at position \(0, 1\) of the input is no token id"):
        model(input_ids=torch.tensor([[0, 500]]))


# --- an output layer that keeps frozen rows ---------------------------------------------------------------------------

TIED = pytest.mark.filterwarnings("ignore:.*trains from the forward on in which:leanvocab.errors.LeanVocabWarning")


def kept_now(model: Any) -> PartialVocabulary:
    vocabulary: PartialVocabulary = model.get_output_embeddings().table.vocabulary
    return vocabulary


@TIED
@pytest.mark.parametrize(
    "family",
    ["llama-tied", "bert-tied", "bart-tied", "t5-tied", "gpt2-tied", "gemma2-softcap", "llama-untied", "phi-bias"],
)
def test_a_row_trains_in_the_softmax_from_the_forward_on_in_which_it_comes(family: str) -> None:
    full = small_lm(family)
    lean = lv.shrink_(copy.deepcopy(full), on_missing="extend", output="frozen")
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.01, momentum=0.9) for each in (lean, full)]
    for step in range(20):
        ids = ids_of(step % 12).clamp(min=3)
        losses = []
        for model, optimizer in zip((lean, full), optimizers, strict=True):
            optimizer.zero_grad()
            loss = model.train()(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(loss.item())
        mask_gradients(full, kept_now(lean))  # the mask follows the arrivals
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        for optimizer in optimizers:
            optimizer.step()
    assert len(kept_now(lean)) > 100
    lv.merge_(lean)
    check_close(dict(lean.named_parameters()), dict(full.named_parameters()), 1e-5)


@TIED
def test_a_graph_of_before_gives_a_tied_matrix_the_gradient_of_the_rows_of_then() -> None:
    full = small_lm("llama-tied")
    lean, counted = copy.deepcopy(full), copy.deepcopy(full)
    first, second = ids_of(0).clamp(min=3), ids_of(4).clamp(min=3)
    lv.shrink_(lean, on_missing="extend")
    losses = [lean.train()(input_ids=first, labels=first).loss]
    then = kept_now(lean)
    losses.append(lean(input_ids=second, labels=second).loss)
    sum(losses).backward()
    expected = []
    for vocabulary, ids in ((then, first), (kept_now(lean), second)):
        model = lv.shrink_(copy.deepcopy(counted), vocabulary).train()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        expected.append(in_full(model))
    torch.testing.assert_close(in_full(lean), sum(expected))


def in_full(model: Any) -> Tensor:
    weight, rows = model.get_input_embeddings().weight, torch.zeros(FULL_SIZE, 32)
    rows[torch.tensor(kept_now(model).token_ids)] = weight.grad
    return rows


def test_it_is_announced_that_rows_were_frozen_before() -> None:
    with pytest.warns(lv.errors.LeanVocabWarning, match=r"model.lm_head|lm_head trains from the forward on in which"):
        lv.shrink_(small_lm("llama-tied"), on_missing="extend")


# --- on an accelerator ------------------------------------------------------------------------------------------------


def on_a_device(model: Any, loss_of: Callable[[Any, int], Tensor], number: int = 4) -> tuple[list[float], list[int]]:
    """Losses of a plain loop on the emulated accelerator, and the waits for it in each forward."""
    optimizer, losses, waits = adamw(model.parameters()), [], []
    model.train()
    torch.manual_seed(0)
    for step in range(number):
        with accelerator.watch() as seen:
            loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        waits.append(len(seen.waits))
    return [float(loss) for loss in losses], waits


@ACCELERATOR
@pytest.mark.parametrize("family", ["roberta", "bart-untied"])
def test_a_forward_waits_for_a_device_once_and_trains_as_if_all_rows_had_been_there(family: str) -> None:
    def loss_of(model: Any, step: int) -> Tensor:
        labels = torch.arange(4) % 3 if family == "roberta" else ids_of(step + 2)
        inputs = {"input_ids": ids_of(step), "labels": labels}
        there = {name: value.to(accelerator.NAME) for name, value in inputs.items()}
        return model(**there).loss  # type: ignore[no-any-return]

    with accelerator.in_use():
        lean, counted = (small_model(family).to(accelerator.NAME) for _ in range(2))
        options = {} if family == "roberta" else {"output": "full"}
        lv.shrink_(lean, on_missing="extend", **options)
        lv.shrink_(counted, EVERYTHING, **options)
        (grown, waits), (expected, base) = on_a_device(lean, loss_of), on_a_device(counted, loss_of)
        assert grown == expected
        assert differing(lean.cpu(), counted.cpu()) == []
    assert all(more <= before + 1 for more, before in zip(waits, base, strict=True)), (waits, base)


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["ordinary", "counted", "grown"])
@pytest.mark.parametrize("then", ["counted", "grown"])
@pytest.mark.parametrize("make", [adamw, OPTIMIZERS["SGD with momentum"], OPTIMIZERS["SGD"]])
def test_a_run_goes_on_from_any_other_and_ends_in_the_same_bits(first: str, then: str, make: Any) -> None:
    def made(kind: str) -> Any:
        model = small_model()
        if kind != "ordinary":
            lv.shrink_(model, *([EVERYTHING] if kind == "counted" else []), on_missing={"grown": "extend"}.get(kind))
        return model, make(model.parameters())

    def saved(kind: str) -> Any:
        model, optimizer = made(kind)
        steps_of(4, of_classes)(model, optimizer)
        return model.state_dict(), optimizer.state_dict()

    states = saved(first)
    ordinary = saved("ordinary")
    assert differing(states[0], ordinary[0]) == []
    ends = []
    for kind, (weights, of_optimizer) in (("ordinary", ordinary), (then, states)):
        model, optimizer = made(kind)
        model.load_state_dict(weights)
        optimizer.load_state_dict(copy.deepcopy(of_optimizer))
        losses = steps_of(4, lambda each, step: of_classes(each, step + 3))(model, optimizer)
        ends.append((losses, model, optimizer.state_dict()["state"]))
    assert ends[0][0] == ends[1][0]
    assert differing(ends[0][1], ends[1][1]) == []
    for number, state in ends[0][2].items():
        for key, value in state.items():
            assert same_bits(torch.as_tensor(value), torch.as_tensor(ends[1][2][number][key]))
    if then == "grown":
        assert lv.status(ends[1][1]).tables[0].num_rows < FULL_SIZE


def test_a_run_with_replayed_decay_goes_on_from_an_ordinary_one() -> None:
    def decayed(parameters: Any) -> Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)

    full = small_model()
    optimizer = decayed(full.parameters())
    steps_of(3, of_classes)(full, optimizer)
    weights, states = copy.deepcopy(full.state_dict()), copy.deepcopy(optimizer.state_dict())
    lean = lv.shrink_(small_model(), on_missing="extend", decay_unused_rows=True)
    again = decayed(lean.parameters())
    lean.load_state_dict(weights)
    again.load_state_dict(states)
    later = steps_of(4, lambda each, step: of_classes(each, step + 3))
    assert later(full, optimizer) == later(lean, again)
    assert differing(full, lean) == []
    assert lv.status(lean).tables[0].num_rows < FULL_SIZE


def test_a_delta_of_a_grown_run_loads_into_one_that_has_not_grown(tmp_path: Any) -> None:
    model = small_model()
    model.save_pretrained(tmp_path / "base")
    lv.shrink_(model, on_missing="extend")
    steps_of(3, of_classes)(model, adamw(model.parameters()))
    lv.save_delta(model, tmp_path / "delta", base=tmp_path / "base")
    again = lv.shrink_(small_model(), on_missing="extend")
    before = lv.status(again).tables[0].num_rows
    lv.load_delta(again, tmp_path / "delta", base=tmp_path / "base")
    assert differing(model, again) == []
    assert lv.status(again).tables[0].num_rows > before


# --- what was made of the rows that there were ------------------------------------------------------------------------


def _held_by_others(folder: Any) -> dict[str, str]:
    """What a first forward says of a model that is wrapped, by the wrapper; in a process of its own."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    said = {}
    for name in ("DistributedDataParallel", "fully_shard", "torch.compile"):
        model = lv.shrink_(small_model(), on_missing="extend").train()
        wrapped: Any = model
        if name == "DistributedDataParallel":
            wrapped = nn.parallel.DistributedDataParallel(model)
        elif name == "fully_shard":
            from torch.distributed.fsdp import fully_shard

            wrapped = fully_shard(model, mesh=distributed.init_device_mesh("cpu", (1,)))
        else:
            wrapped = torch.compile(model, backend="eager")
        try:
            of_classes(wrapped, 0)
        except lv.errors.ModelError as error:
            said[name] = str(error)
        else:
            said[name] = "nothing"
    distributed.destroy_process_group()
    return said


def test_wrappers_that_were_made_of_the_rows_of_the_start_are_refused_at_the_first_forward(tmp_path: Any) -> None:
    said = in_own_process(_held_by_others, tmp_path)
    assert {name: "no rows can come here while the model trains" in words for name, words in said.items()} == {
        "DistributedDataParallel": True,
        "fully_shard": True,
        "torch.compile": True,
    }, said
    assert "DistributedDataParallel adds up those of the start" in said["DistributedDataParallel"]
    assert "sharded over processes" in said["fully_shard"]
    assert "a compiled forward looks at no ids" in said["torch.compile"]


def test_deepspeeds_copies_are_refused() -> None:
    model = lv.shrink_(small_model(), on_missing="extend").train()
    model.roberta.embeddings.word_embeddings.weight._hp_mapping = object()  # as ZeRO-1 and ZeRO-2 mark a parameter
    with pytest.raises(lv.errors.ModelError, match=r"DeepSpeed holds copies of its rows\. Count the data first"):
        of_classes(model, 0)


@ACCELERATOR
def test_batches_of_accelerates_loader_are_seen_on_the_host_and_no_forward_waits() -> None:
    from accelerate.data_loader import prepare_data_loader

    rows = [{"input_ids": ids, "labels": torch.tensor(0)} for step in range(5) for ids in ids_of(step)]
    with accelerator.in_use():
        lean, counted = (small_model().to(accelerator.NAME) for _ in range(2))
        lv.shrink_(lean, on_missing="extend")
        lv.shrink_(counted, EVERYTHING)
        found = []
        for model in (lean, counted):
            loader = torch.utils.data.DataLoader(rows, batch_size=4)
            loader = prepare_data_loader(loader, device=torch.device(accelerator.NAME), put_on_device=True)
            growing.see_batches(loader, model)
            growing.see_batches(loader, model)  # once is enough
            assert len(loader) == 5
            batches = iter(loader)
            found.append(on_a_device(model, lambda each, step, batches=batches: each(**next(batches)).loss, 5))
        assert found[0] == found[1]
        stranger = {"input_ids": torch.tensor([[0, 499]]), "labels": torch.tensor([0])}
        lean.train()(**{name: value.to(accelerator.NAME) for name, value in stranger.items()})


@ACCELERATOR
def test_an_id_that_no_argument_shows_is_an_error_before_the_step() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(FULL_SIZE, 4)

        def forward(self, input_ids: Tensor) -> Tensor:
            output: Tensor = self.table(input_ids + 1).sum()
            return output

    with accelerator.in_use():
        model = lv.shrink_(Shifted().to(accelerator.NAME), on_missing="extend", embedding="table").train()
        optimizer = adamw(model.parameters())
        model(torch.tensor([[5, 9]]).to(accelerator.NAME)).backward()
        with pytest.raises(lv.errors.MissingTokenError, match=r"token id 6 at .* came without its row.*always_keep"):
            optimizer.step()


def test_weight_decay_that_is_not_replayed_is_announced() -> None:
    model = lv.shrink_(small_model(), on_missing="extend")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    with pytest.warns(
        lv.errors.LeanVocabWarning, match="decay unused rows too, and here a row does from when it comes"
    ):
        steps_of(1, of_classes)(model, optimizer)


@ACCELERATOR
def test_a_deep_copy_on_a_device_brings_rows_to_its_own_tables() -> None:
    with accelerator.in_use():
        model = lv.shrink_(small_model().to(accelerator.NAME), on_missing="extend").train()
        other = copy.deepcopy(model)
        before = lv.status(model).tables[0].num_rows
        loss = other(input_ids=ids_of(0).to(accelerator.NAME), labels=(torch.arange(4) % 3).to(accelerator.NAME)).loss
        loss.backward()
        adamw(other.parameters()).step()  # which raises where a row was missing
        assert lv.status(other).tables[0].num_rows > before
        assert lv.status(model).tables[0].num_rows == before
