"""What a CPU cannot tell: the same equalities on a device, where frozen rows are held or streamed, and errors wait for a step.

The device is a GPU where there is one, and the emulated accelerator elsewhere.
"""

import copy
from pathlib import Path
from typing import Any

import accelerator
import pytest
import torch
from device_at_hand import DEVICE
from models import FULL_SIZE, small_lm
from references import (
    LANGUAGE_MODELS,
    QUIET,
    check_close,
    check_twenty_steps,
    gradients,
    lm_batch,
    lm_vocabulary,
    reference,
)

from leanvocab.errors import MissingTokenError
from leanvocab.model.shrink import merge_, shrink_

pytestmark = [*QUIET, pytest.mark.usefixtures("few_scores_at_once")]


def there(step: int = 0) -> dict[str, Any]:
    return {name: value.to(DEVICE) for name, value in lm_batch(step).items()}


QUICK = (
    LANGUAGE_MODELS if DEVICE != accelerator.NAME else ("llama-tied", "bert-tied")
)  # an emulated device streams slowly
STREAMED = [pytest.param(name, "host", marks=() if name in QUICK else pytest.mark.slow) for name in LANGUAGE_MODELS]


@pytest.mark.parametrize(("name", "frozen_rows"), [*((name, "device") for name in LANGUAGE_MODELS), *STREAMED])
def test_frozen_training_is_full_training_with_the_other_rows_gradients_masked(name: str, frozen_rows: str) -> None:
    check_twenty_steps(name, "frozen", DEVICE, frozen_rows=frozen_rows)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_restricted_training_is_full_training_with_the_other_scores_at_minus_infinity(name: str) -> None:
    check_twenty_steps(name, "restricted", DEVICE)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_evaluation_and_generation_are_the_full_models(name: str) -> None:
    full = small_lm(name).to(DEVICE).eval()
    lean = shrink_(copy.deepcopy(full), lm_vocabulary(), output="frozen", on_missing="base").eval()
    torch.testing.assert_close(lean(**there()).logits.clone(), full(**there()).logits, rtol=1e-5, atol=1e-5)
    if name != "bert-tied":
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        prompt = there()["input_ids"][:, :5]
        assert torch.equal(lean.generate(input_ids=prompt, **options), full.generate(input_ids=prompt, **options))


def test_the_full_mode_of_an_untied_model_is_ordinary_training_to_the_bit() -> None:
    full = small_lm("llama-untied").to(DEVICE)
    lean = shrink_(copy.deepcopy(full), lm_vocabulary())
    for model in (full, lean):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0, fused=True)
        for step in range(20):
            model(**there(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    merge_(lean)
    for first, second in zip(full.parameters(), lean.parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("output", ["full", "frozen"])
def test_an_unseen_id_in_training_is_an_error_before_the_step_touches_a_parameter(output: Any) -> None:
    lean = shrink_(small_lm("llama-untied").to(DEVICE), lm_vocabulary(), output=output)
    optimizer = torch.optim.SGD(lean.parameters(), lr=0.1)
    before = copy.deepcopy(lean.state_dict())
    inputs = there()
    inputs["input_ids"][1, 2] = next(each for each in range(FULL_SIZE) if each not in lm_vocabulary())

    def take_a_step() -> None:
        lean(**inputs).loss.backward()
        optimizer.step()

    with pytest.raises(MissingTokenError):
        take_a_step()
    assert all(torch.equal(before[name], value) for name, value in lean.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_gradients_are_those_of_the_full_model_within_its_rounding(dtype: torch.dtype) -> None:
    base = small_lm("gemma2-softcap").to(DEVICE)
    models = (
        reference(base, "frozen", lm_vocabulary()),
        shrink_(copy.deepcopy(base), lm_vocabulary(), output="frozen"),
    )
    scaler = torch.amp.GradScaler(DEVICE, init_scale=128.0, enabled=dtype == torch.float16)
    found = []
    for model in models:
        with torch.autocast(DEVICE, dtype):
            loss = model(**there()).loss
        scaler.scale(loss).backward()
        found.append(gradients(model, lm_vocabulary()))
    check_close(found[1], found[0], 0.05)


def test_finetune_leaves_the_model_of_the_run_with_the_full_vocabulary(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="finetune reads its data with it")
    from texts import pairs, save_language_model, write

    from leanvocab.finetune.job import finetune
    from leanvocab.finetune.settings import FineTuneSettings

    save_language_model(tmp_path / "model", "llama", tied=False)
    write(tmp_path / "data.csv", pairs(24))
    given: dict[str, Any] = {
        "task": "causal-lm",
        "max_steps": 4,
        "max_length": 32,
        "bf16": True,
        "cpu": DEVICE == "cpu",
    }
    for name, changes in (("shrunk", {}), ("full", {"full_vocabulary": True})):
        finetune(tmp_path / "model", tmp_path / "data.csv", tmp_path / name, FineTuneSettings(**given, **changes))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("shrunk", "full")]
    assert weights[0] == weights[1]


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU does not count what it allocates")
def test_the_loss_never_holds_the_logits() -> None:
    lean = shrink_(small_lm("llama-tied").to(DEVICE), lm_vocabulary(), output="frozen")
    ids = torch.randint(0, 3, (64, 512), device=DEVICE)
    hidden = lean.model(ids).last_hidden_state.detach()
    device = torch.get_device_module(DEVICE)
    device.reset_peak_memory_stats()
    before = device.memory_allocated()
    lean.loss_function(lean.lm_head(hidden), ids, vocab_size=FULL_SIZE).backward()
    assert device.max_memory_allocated() - before < ids.numel() * FULL_SIZE * 4 / 2
