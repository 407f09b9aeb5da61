"""Trainer runs of language models whose output layer is partial: what their checkpoints hold, and where they go on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import differing
from disk import read_all
from models import FULL_SIZE, small_model
from test_trainer import run, run_all, same_files
from transformers import Trainer, TrainingArguments

import leanvocab as lv
from leanvocab.checkpoints.merge import merge_checkpoint

USED = torch.randint(3, FULL_SIZE, (32, 12), generator=torch.Generator().manual_seed(7)).unique()
MATRIX = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Runs of a tied model: frozen, with the best checkpoint at the end, and with deltas that stop half way."""
    folder = tmp_path_factory.mktemp("lm-runs")
    small_model("llama-tied").save_pretrained(folder / "base")
    options = {
        "frozen": {},
        "best": {"best": True},
        "best-delta": {"best": True, "checkpoints": "delta"},
        "delta": {"checkpoints": "delta", "interrupt_at": 4},
        "restricted": {"mode": "restricted"},
    }
    shared = {"base": str(folder / "base"), "token_ids": "used", "language_model": True}
    found = run_all({name: {"output": str(folder / name), **shared, **each} for name, each in options.items()})
    return folder, found


def again(folder: Path, name: str, **options: Any) -> dict[str, Any]:
    """Another run of the same model into a folder of its own."""
    return run(output=str(folder / name), base=str(folder / "base"), language_model=True, **options)


@pytest.mark.parametrize("mode", ["frozen", "restricted"])
def test_a_checkpoint_is_full_and_tied_with_zeros_for_what_did_not_train(
    runs: tuple[Path, dict[str, dict[str, Any]]], mode: str
) -> None:
    folder, results = runs
    assert len(results[mode]["losses"]) == 8
    base, saved = (read_all(folder / name) for name in ("base", f"{mode}/checkpoint-4"))
    assert saved.keys() == base.keys()  # the output layer is tied, and not there
    unused = torch.ones(FULL_SIZE, dtype=torch.bool)
    unused[USED] = False
    assert torch.equal(saved[MATRIX][unused], base[MATRIX][unused])
    assert not torch.equal(saved[MATRIX], base[MATRIX])
    states = torch.load(folder / mode / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    of_matrix = [each for each in states.values() if each["exp_avg"].shape == (FULL_SIZE, 48)]
    assert len(of_matrix) == 1
    for key in ("exp_avg", "exp_avg_sq"):
        assert not of_matrix[0][key][unused].any()
        assert of_matrix[0][key][~unused].any()


def test_a_shrunk_run_goes_on_as_if_it_had_never_stopped(runs: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    folder, results = runs
    resumed = again(folder, "resumed", token_ids="used", resume=str(folder / "frozen" / "checkpoint-4"))
    assert resumed["losses"] == results["frozen"]["losses"]
    assert same_files(folder / "frozen" / "final", folder / "resumed" / "final") == []
    assert differing(read_all(folder / "frozen/checkpoint-8"), read_all(folder / "resumed/checkpoint-8")) == []


def test_an_ordinary_run_goes_on_where_leanvocab_is_not_installed(
    runs: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    folder, results = runs
    resumed = again(folder, "ordinary", library=False, resume=str(folder / "frozen" / "checkpoint-4"))
    assert "error" not in resumed
    assert resumed["losses"][:4] == results["frozen"]["losses"][:4]  # from the checkpoint's own log
    # The next loss is of the same weights and batch, summed in another order; from then on every row trains.
    assert resumed["losses"][4] == pytest.approx(results["frozen"]["losses"][4], rel=1e-5)
    unused = [token_id for token_id in range(FULL_SIZE) if token_id not in USED.tolist()]
    final, before = (read_all(folder / name)[MATRIX] for name in ("ordinary/final", "frozen/checkpoint-4"))
    assert not torch.equal(final[unused], before[unused])


def test_an_ordinary_run_does_not_go_on_frozen(runs: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    """Its softmax moved every row, and its states would go on doing so."""
    folder, _ = runs
    again(folder, "plain", library=False, max_steps=2)
    refused = again(folder, "refused", token_ids="used", resume=str(folder / "plain" / "checkpoint-2"))
    assert refused["error"] == "OptimizerError"
    assert "ordinary training would go on moving those rows" in refused["message"]


def test_the_best_checkpoint_is_loaded_at_the_end(runs: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    folder, results = runs
    assert results["best"]["losses"] == results["best-delta"]["losses"]
    final = read_all(folder / "best" / "final")
    steps = [step for step in (2, 4, 6, 8) if not differing(read_all(folder / f"best/checkpoint-{step}"), final)]
    assert len(steps) == 1
    assert differing(read_all(folder / "best-delta" / "final"), final) == []


def test_resuming_from_a_delta_equals_never_having_stopped(runs: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    folder, results = runs
    resumed = again(
        folder, "again", token_ids="used", checkpoints="delta", resume_delta=str(folder / "delta" / "checkpoint-4")
    )
    assert resumed["losses"][-4:] == results["frozen"]["losses"][-4:]
    assert differing(read_all(folder / "again" / "final"), read_all(folder / "frozen" / "final")) == []
    merge_checkpoint(base=folder / "base", delta=folder / "again/checkpoint-8", output=folder / "merged", verify=True)
    assert differing(read_all(folder / "merged"), read_all(folder / "frozen" / "final")) == []


@pytest.mark.parametrize("mode", ["frozen", "restricted"])
@pytest.mark.filterwarnings('ignore:.*output="restricted" trains a softmax:UserWarning')
def test_the_callback_shrinks_the_output_layer_too(tmp_path: Path, mode: str) -> None:
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    data = [{"input_ids": ids, "labels": ids} for ids in USED[:48].view(4, 12)]
    callback = lv.LeanVocabCallback(lv.PartialVocabulary(USED.tolist(), FULL_SIZE), output=mode)
    trainer = Trainer(small_model("llama-tied"), arguments, train_dataset=data, callbacks=[callback])
    assert lv.status(trainer.model).output == mode
    trainer.train()
    assert lv.status(trainer.model).tables[0].output == mode
    assert trainer.model.lm_head.weight is trainer.model.model.embed_tokens.weight
