"""Faults that an accelerator shows and a CPU does not: missing ids, waits, modes and default devices, on the emulated device."""

import copy
import gc
import sys
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import accelerator
import pytest
import torch
from accelerator import streams
from models import FULL_SIZE, small_lm
from references import QUIET, lm_batch, lm_vocabulary
from torch import Tensor, nn

from leanvocab.errors import MissingTokenError
from leanvocab.model.growing import extend_
from leanvocab.model.shrink import merge_, shrink_
from leanvocab.partial.module import shrunk_modules
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary
from versions import computes_on_meta

DEVICE = accelerator.NAME
OUTSIDE = next(i for i in range(3, FULL_SIZE) if i not in lm_vocabulary())

pytestmark = QUIET


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    if not accelerator.can_be_emulated():
        pytest.skip("torch can emulate a device from 2.13 on")
    before = list(shrunk_modules())  # that other libraries hold on to
    with accelerator.in_use():
        yield
    # A test that fails leaves its models to pytest, and notes of theirs to the steps of other tests.
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        vars(sys).pop(name, None)
    gc.collect()
    assert [module for module in shrunk_modules() if module not in before] == []


def lean_model(name: str = "llama-untied", **options: Any) -> nn.Module:
    return shrink_(small_lm(name).to(DEVICE).train(), lm_vocabulary(), **options)


def there(step: int = 0, missing: str | None = None) -> dict[str, Tensor]:
    """A batch on the device, with an id in one of its tensors that the vocabulary has not."""
    inputs = lm_batch(step)
    if missing is not None:
        inputs[missing][1, 2] = OUTSIDE
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def another_optimizer() -> torch.optim.Optimizer:
    """Of a model of the CPU that has nothing to do with leanvocab."""
    layer = nn.Linear(2, 2)
    layer(torch.ones(2)).sum().backward()
    return torch.optim.SGD(layer.parameters(), lr=0.1)


# --- missing ids ------------------------------------------------------------------------------------------------------


def test_a_missing_id_is_an_error_where_a_scaler_skips_the_step() -> None:
    lean = lean_model()
    optimizer = torch.optim.AdamW(lean.parameters())
    scaler = torch.amp.GradScaler(DEVICE)

    def train() -> None:
        for step in range(3):
            with torch.autocast(DEVICE, torch.float16):
                loss = lean(**there(step, missing="input_ids")).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    with pytest.raises(MissingTokenError):
        train()


@pytest.mark.parametrize("is_far_behind", [True, False])
@pytest.mark.parametrize("missing", ["input_ids", "labels"])
def test_a_missing_id_is_an_error_at_the_next_forward_where_no_step_is_taken(
    missing: str, is_far_behind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_far_behind:
        monkeypatch.setattr(streams, "LAG", sys.maxsize)
    lean = lean_model(output="restricted")
    lean(**there(missing=missing)).loss.backward()
    with pytest.raises(MissingTokenError):
        lean(**there())
    lean(**there())


def test_a_missing_id_is_an_error_at_the_next_forward_of_the_module_alone() -> None:
    lean = lean_model(output="restricted")
    lean.model.embed_tokens(there(missing="input_ids")["input_ids"])
    with pytest.raises(MissingTokenError):
        lean.model.embed_tokens(there()["input_ids"])


def test_a_missing_id_is_an_error_before_the_step_where_its_table_does_not_train() -> None:
    lean = lean_model()
    lean.model.embed_tokens.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([lean.lm_head.weight], lr=0.1)
    lean(**there(missing="input_ids")).loss.backward()
    with pytest.raises(MissingTokenError):
        optimizer.step()


def test_a_missing_id_is_an_error_before_any_step_where_nothing_of_the_model_trains() -> None:
    lean = lean_model().requires_grad_(False)
    lean(**there(missing="input_ids"))
    with pytest.raises(MissingTokenError):
        another_optimizer().step()


def test_ids_and_labels_that_are_missing_in_one_batch_are_one_error() -> None:
    lean = lean_model("bart-tied", output="restricted")
    optimizer = torch.optim.SGD(lean.parameters(), lr=0.1)
    lean(**there(missing="labels")).loss.backward()
    with pytest.raises(MissingTokenError):
        optimizer.step()
    optimizer.zero_grad()
    lean(**there()).loss.backward()
    optimizer.step()


def test_a_model_that_was_let_go_of_does_not_disturb_another_optimizer() -> None:
    optimizer = another_optimizer()
    gc.disable()
    try:
        lean = lean_model()
        lean(**there(missing="input_ids"))
        del lean
        optimizer.step()
    finally:
        gc.enable()


def test_a_model_that_waits_for_the_collector_does_not_disturb_another_optimizer() -> None:
    optimizer = another_optimizer()
    gc.disable()
    try:
        lean: Any = lean_model()
        lean.itself = [lean]
        lean(**there(missing="input_ids"))
        del lean
        optimizer.step()
    finally:
        gc.enable()


def test_a_model_that_was_let_go_of_gives_back_its_memory_at_once() -> None:
    gc.disable()
    try:
        lean = lean_model()
        alive = weakref.ref(lean)
        del lean
        assert alive() is None
    finally:
        gc.enable()


def test_a_missing_label_is_an_error_after_the_model_has_moved() -> None:
    lean = lean_model(output="restricted")
    lean(**there(missing="labels")).loss.backward()
    lean.to(DEVICE)
    with pytest.raises(MissingTokenError):
        torch.optim.SGD(lean.parameters(), lr=0.1).step()


# --- meta, inference, default devices ---------------------------------------------------------------------------------


needs_shapes = pytest.mark.skipif(not computes_on_meta(), reason="models of this transformers compute nothing on meta")


@needs_shapes
def test_a_model_on_meta_does_not_disturb_another_optimizer() -> None:
    lean = lean_model().to("meta")
    lean(**{name: value.to("meta") for name, value in lm_batch().items()})
    another_optimizer().step()


@needs_shapes
def test_logits_of_a_frozen_layer_on_meta_have_a_shape() -> None:
    lean = lean_model(output="frozen").to("meta")
    inputs = lm_batch()["input_ids"].to("meta")
    assert lean(input_ids=inputs).logits.clone().shape == (*inputs.shape, FULL_SIZE)


def test_frozen_rows_that_an_evaluation_made_serve_in_training() -> None:
    lean = lean_model("bert-tied", output="frozen").eval()
    with torch.inference_mode():
        lean(**there())
    lean.train()(**there()).loss.backward()


def default_device(is_set: bool) -> AbstractContextManager[object]:
    return torch.device(DEVICE) if is_set else nullcontext()


@pytest.mark.parametrize(
    ("output", "during"),
    [
        ("full", "shrinking"),
        ("restricted", "shrinking"),
        ("frozen", "shrinking"),
        ("full", "training"),
        ("restricted", "training"),
        ("frozen", "training"),
        ("full", "merging"),
        ("restricted", "merging"),
        ("frozen", "merging"),
    ],
)
def test_a_default_device_changes_nothing(output: Any, during: str) -> None:
    found = []
    for default in ("nowhere", during):
        model, inputs = small_lm("llama-untied").to(DEVICE), there()
        with default_device(default == "shrinking"):
            shrink_(model, lm_vocabulary(), output=output)
        with default_device(default == "training"):
            model(**inputs).loss.backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        with default_device(default == "merging"):
            merge_(model)
        found.append([parameter.detach().cpu() for parameter in model.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


# --- rows on the host -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])  # rows come once, or twice
def test_rows_on_the_host_come_in_order_and_are_not_written_over(smoothing: float, few_scores_at_once: None) -> None:
    """Blocks arrive on a stream of their own, from pinned memory and to memory that are used again."""
    known = len(accelerator.hazards())
    found = []
    for device in ("cpu", DEVICE):
        model = shrink_(small_lm("llama-tied").to(device).train(), lm_vocabulary(), frozen_rows="host")
        for step in range(2):
            inputs = {name: value.to(device) for name, value in lm_batch(step).items()}
            logits, labels = model(input_ids=inputs["input_ids"]).logits.flatten(0, 1), inputs["labels"].flatten()
            nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing).backward()
        found.append([parameter.grad.cpu() for parameter in model.parameters()])
    for there, here in zip(*found, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-6)
    assert accelerator.hazards()[known:] == []


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_on_the_host_come_once_where_the_hidden_states_alone_need_them(smoothing: float) -> None:
    model, batch = lean_model("llama-tied", frozen_rows="host"), there()
    for _ in range(2):
        logits = model(input_ids=batch["input_ids"]).logits.flatten(0, 1)
        with accelerator.watch() as seen:
            nn.functional.cross_entropy(logits, batch["labels"].flatten(), label_smoothing=smoothing)
    frozen = model.lm_head.frozen_rows.sizes
    brought = {
        line.split(":")[0]: num_bytes for line, num_bytes in seen.traffic_by_line().items() if line.endswith(" _send")
    }
    assert brought["devices.py"] == (2 if smoothing else 1) * frozen.frozen_rows * frozen.dim * 4


# --- waits ------------------------------------------------------------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "frozen on the device": {"output": "frozen"},
    "frozen on the host": {"output": "frozen", "frozen_rows": "host"},
    "restricted": {"output": "restricted"},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_with_labels_does_not_wait(mode: str) -> None:
    lean = lean_model(**MODES[mode])
    inputs = there()
    lean(**inputs).loss.backward()
    with accelerator.watch() as seen:
        lean(**inputs).loss  # noqa: B018
    assert not seen.waits


def test_blocks_of_rows_of_the_host_come_without_a_wait_for_each(request: pytest.FixtureRequest) -> None:
    found = []
    for few in (False, True):
        if few:
            request.getfixturevalue("few_scores_at_once")
        lean = lean_model(output="frozen", frozen_rows="host")
        inputs = there()
        lean(**inputs).loss.backward()
        with accelerator.watch() as seen:
            lean(**inputs).loss  # noqa: B018
        found.append(len(seen.waits))
    assert found[0] == found[1]


def test_a_lookup_in_evaluation_that_misses_an_id_waits_once() -> None:
    lean = lean_model().eval()
    inputs = there(missing="input_ids")["input_ids"]
    lean(input_ids=inputs)
    with torch.no_grad(), accelerator.watch() as seen:
        lean.model.embed_tokens(inputs)
    assert len(seen.waits) <= 1


def test_further_rows_and_their_states_are_made_on_the_device() -> None:
    lean = lean_model()
    optimizer = torch.optim.AdamW(lean.parameters(), lr=0.01, weight_decay=0.0)
    for missing in (None, "input_ids"):
        lean(**there(missing=missing)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        extend_(lean, [OUTSIDE], optimizer=optimizer)
    weight = lean.model.embed_tokens.weight
    assert len(weight) == len(lm_vocabulary()) + 1
    assert {weight.device.type, *(state.device.type for state in optimizer.state[weight].values() if state.ndim)} == {
        DEVICE
    }


class Reading(nn.Module):
    """Looks ids up, and reads rows of the weight by an int and by a tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(12, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) + self.table.weight[8] + self.table.weight[ids].sin()


def test_reads_of_rows_do_not_wait_and_a_missing_id_among_them_is_an_error_later() -> None:
    full, vocabulary = Reading().to(DEVICE), PartialVocabulary([1, 3, 5, 8, 11], 12)
    lean = shrink_(copy.deepcopy(full), vocabulary, embedding="table")
    ids = torch.tensor([[8, 3, 3], [11, 1, 5]], device=DEVICE)
    for model in (full, lean):
        model(ids).sum().backward()
    with accelerator.watch() as seen:
        rows = lean(ids)
    assert not seen.waits
    assert torch.equal(rows.cpu(), full(ids).cpu())
    assert torch.equal(lean.table.weight.grad.cpu(), full.table.weight.grad.cpu()[list(vocabulary)])
    lean(ids.where(ids != 5, 4))
    with pytest.raises(MissingTokenError, match="token id 4 at"):
        lean(ids)


def test_a_step_of_a_shrunk_model_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LAG", sys.maxsize)
    lean = lean_model()
    optimizer = torch.optim.SGD(lean.parameters(), lr=0.1)
    for _ in range(2):
        lean(**there()).loss.backward()
        with accelerator.watch() as seen:
            optimizer.step()
    assert [wait.kind for wait in seen.waits] == ["event"]


def test_steps_of_another_optimizer_do_not_wait() -> None:
    lean = lean_model()
    other = another_optimizer()
    lean(**there()).loss.backward()
    torch.optim.SGD(lean.parameters(), lr=0.1).step()
    with accelerator.watch() as seen:
        other.step()
        other.step()
    assert not seen.waits


@pytest.mark.parametrize("is_far_behind", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
@pytest.mark.usefixtures("few_scores_at_once")
def test_ignored_labels_change_nothing(
    mode: str, reduction: str, share: float, is_far_behind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several chunks, of which the last have ignored labels alone; a bias gets gradients of all tokens."""
    if is_far_behind:
        monkeypatch.setattr(streams, "LAG", sys.maxsize)
    chosen = torch.rand(40, generator=torch.Generator().manual_seed(0)) < share
    found = []
    for device in ("cpu", DEVICE):
        lean = shrink_(small_lm("phi-bias").to(device).train(), lm_vocabulary(), **MODES[mode])
        hidden = torch.randn(40, lean.config.hidden_size, generator=torch.Generator().manual_seed(1)).to(device)
        hidden.requires_grad_()
        labels = torch.tensor(lm_vocabulary().token_ids)[torch.arange(40)].masked_fill(chosen, -100).to(device)
        loss = nn.functional.cross_entropy(lean.lm_head(hidden), labels, reduction=reduction)
        loss.sum().backward()
        gradients = [hidden.grad, lean.lm_head.weight.grad, lean.lm_head.bias.grad]
        found.append([loss, *(torch.zeros(()) if each is None else each for each in gradients)])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second.cpu(), equal_nan=True)


@pytest.mark.parametrize("mode", ["frozen on the device", "frozen on the host", "restricted"])
def test_a_label_that_is_no_token_id_is_an_error_before_the_step(mode: str) -> None:
    lean = lean_model(**MODES[mode])
    inputs = there()
    inputs["labels"][1, 2] = FULL_SIZE
    lean(**inputs).loss.backward()
    with pytest.raises(IndexError, match=f"label {FULL_SIZE} at flat position .* is no token id"):
        torch.optim.SGD(lean.parameters(), lr=0.1).step()


# --- frozen rows ------------------------------------------------------------------------------------------------------


def test_frozen_rows_are_brought_once_where_training_and_evaluation_have_two_dtypes() -> None:
    lean = lean_model("llama-tied", output="frozen")
    inputs = there()
    brought = []
    for _ in range(3):
        with accelerator.watch() as seen:
            with torch.autocast(DEVICE, torch.bfloat16):
                lean.train()(**inputs).loss.backward()
            with torch.no_grad():
                lean.eval()(input_ids=inputs["input_ids"]).logits.clone()
        brought.append(sum(wait.kind == "to device" for wait in seen.waits))
    assert brought[1:] == [0, 0]
