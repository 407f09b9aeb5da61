"""Runs that a signal or a bad loss ends: nothing is lost, nothing bad is kept, and they go on to the same bits."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ended_runs import at_step, settings, weights
from runs import run
from transformers import Trainer

from leanvocab.errors import CheckpointError, InterruptedRunError, SettingsError, TrainingError
from leanvocab.finetune.job import finetune


@pytest.mark.parametrize(
    "step", [0, 2, 5, 7]
)  # the first, in the midst of an epoch, its last, in the midst of the second
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_checkpoint_from_which_it_goes_on_to_the_same_bits(
    base: Path, data: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, step: int
) -> None:
    before = signal.getsignal(signal.SIGINT)
    at_step(monkeypatch, step, lambda loss: (os.kill(os.getpid(), number), loss)[1])
    with pytest.raises(
        InterruptedRunError, match=rf"after step {step + 1} of 12; .*checkpoint-{step + 1} is whole"
    ) as caught:
        finetune(base, data, tmp_path / "out", settings())
    assert caught.value.signal == number
    assert not (tmp_path / "out/model.safetensors").exists()
    resumed = finetune(base, data, tmp_path / "out", settings(resume=True))
    assert weights(tmp_path / "out") == weights(whole.output_dir)
    assert (resumed.losses, resumed.scores) == (whole.losses, whole.scores)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_whose_last_step_is_done_comes_to_its_end(
    base: Path, data: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 11, lambda loss: (os.kill(os.getpid(), signal.SIGTERM), loss)[1])
    finetune(base, data, tmp_path / "out", settings())
    assert weights(tmp_path / "out") == weights(whole.output_dir)


def test_the_last_checkpoint_stays_beside_the_best_one_where_one_is_kept(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs: dict[str, Any] = {"best": "loss", "save_total_limit": 1}
    whole = finetune(base, data, tmp_path / "whole", settings(**knobs))
    at_step(monkeypatch, 9, lambda loss: (os.kill(os.getpid(), signal.SIGINT), loss)[1])
    with pytest.raises(InterruptedRunError, match=r"after step 10 of 12; .*checkpoint-10 is whole"):
        finetune(base, data, tmp_path / "out", settings(**knobs))
    resumed = finetune(base, data, tmp_path / "out", settings(**knobs, resume=True))
    assert weights(tmp_path / "out") == weights(whole.output_dir)
    assert (resumed.losses, resumed.scores) == (whole.losses, whole.scores)
    assert len(list((tmp_path / "out/checkpoints").glob("checkpoint-*"))) == 1


def test_without_checkpoints_a_signal_says_that_the_run_starts_anew(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 1, lambda loss: (os.kill(os.getpid(), signal.SIGINT), loss)[1])
    with pytest.raises(
        InterruptedRunError, match=r"SIGINT stopped the run after step 2 of 12; no checkpoint was asked for"
    ):
        finetune(base, data, tmp_path / "out", settings(save_strategy="no"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_says_how_to_go_on_and_ends_as_signals_end(
    base: Path, data: Path, tmp_path: Path, number: int
) -> None:
    arguments = [
        "finetune",
        str(base),
        str(data),
        "-o",
        str(tmp_path / "out"),
        "--cpu",
        "--batch-size",
        "8",
        "--overwrite",
    ]
    program = f"""
import os, sys, transformers
from leanvocab.cli.app import app
step = transformers.Trainer.training_step
def training_step(self, *args, **kwargs):
    if self.state.global_step == 3:
        os.kill(os.getpid(), {int(number)})
    return step(self, *args, **kwargs)
transformers.Trainer.training_step = training_step
sys.argv = ["leanvocab", *sys.argv[1:]]
app()
"""
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 128 + number, done.stderr
    last = done.stderr.strip().splitlines()[-1].strip()
    assert last == f"leanvocab finetune {base} {data} -o {tmp_path / 'out'} --cpu --batch-size 8 --resume"
    run(*last.split()[1:])


def test_a_checkpoint_that_was_cut_off_is_left_out_named_and_removed(
    base: Path, data: Path, whole: Any, tmp_path: Path
) -> None:
    for left in ("trainer_state.json", "optimizer.pt", "model.safetensors", "rng_state.pth"):
        folder = tmp_path / left / "checkpoints"
        shutil.copytree(whole.output_dir / "checkpoints", folder)
        half = folder / "checkpoint-12"
        (half / left).write_bytes((half / left).read_bytes()[:-7])
        half.rename(folder / "checkpoint-8")
        result = finetune(base, data, folder.parent, settings(resume=True))
        assert f"{folder / 'checkpoint-8'} was cut off while it was written, and is left out." in result.notes
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-12", "checkpoint-6", "run.json"]
        assert weights(folder.parent) == weights(whole.output_dir)


def test_before_the_first_checkpoint_resuming_begins_anew_and_says_so(
    base: Path, data: Path, whole: Any, tmp_path: Path
) -> None:
    (tmp_path / "out/checkpoints/checkpoint-3").mkdir(parents=True)
    result = finetune(base, data, tmp_path / "out", settings(resume=True))
    assert result.notes[-1] == f"There is no checkpoint in {tmp_path / 'out/checkpoints'} yet: the run began anew."
    assert weights(tmp_path / "out") == weights(whole.output_dir)


def test_resuming_a_run_that_ended_says_that_nothing_was_trained(
    base: Path, data: Path, whole: Any, tmp_path: Path
) -> None:
    shutil.copytree(whole.output_dir, tmp_path / "out")
    result = finetune(base, data, tmp_path / "out", settings(resume=True))
    assert result.notes[-1] == "The run had come to its end, step 12, before: nothing was trained."
    assert weights(tmp_path / "out") == weights(whole.output_dir)
    shutil.rmtree(tmp_path / "out/checkpoints")
    with pytest.raises(
        CheckpointError, match=r"a run ended in .*out and left no checkpoint to resume from; set overwrite"
    ):
        finetune(base, data, tmp_path / "out", settings(resume=True))


def test_resuming_with_other_settings_or_data_is_refused_by_name(
    base: Path, data: Path, whole: Any, tmp_path: Path
) -> None:
    shutil.copytree(whole.output_dir, tmp_path / "out")
    with pytest.raises(
        SettingsError, match=r"another run: batch_size is 4 and was 8; learning_rate is 0.02 and was 0.01"
    ):
        finetune(base, data, tmp_path / "out", settings(resume=True, learning_rate=0.02, batch_size=4))
    shutil.copytree(data, tmp_path / "data")
    with (tmp_path / "data/train.csv").open("a") as file:
        file.write((data / "train.csv").read_text().splitlines()[1] + "\n")
    with pytest.raises(
        SettingsError, match=r"another run: split 'train' holds other data\. To go on, give what that run"
    ):
        finetune(base, tmp_path / "data", tmp_path / "out", settings(resume=True))
    longer = finetune(base, data, tmp_path / "out", settings(resume=True, epochs=3))
    assert longer.num_steps == 18


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_at_its_step(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    at_step(monkeypatch, 7, lambda loss: loss * bad)
    with pytest.raises(
        TrainingError, match=r"the loss of step 8 is not finite.*checkpoint-6, is from before\. Try a lower"
    ):
        finetune(base, data, tmp_path / "out", settings())
    assert not (tmp_path / "out/model.safetensors").exists()


def test_weights_that_are_not_finite_are_never_saved(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.training_step

    def training_step(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, model, *args, **kwargs)
        if self.state.global_step == 5:
            model.get_input_embeddings().weight.grad[3, 1] = float("nan")
        return loss

    monkeypatch.setattr(Trainer, "training_step", training_step)
    with pytest.raises(
        TrainingError, match=r"word_embeddings.weight is not finite after step 6.*no checkpoint was written"
    ):
        finetune(base, data, tmp_path / "out", settings())
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["run.json"]


def test_what_no_error_of_ours_foresaw_is_one_message_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, message in (
        (KeyError("text"), "KeyError: 'text'. No error of leanvocab's own foresaw this; --debug"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 6144 vs 6036"),
            "a file could not be written to its end, most likely because the disk is full ([enforce fail",
        ),
        (OSError(28, "No space left on device", "/disk/file"), "No space left on device: /disk/file"),
    ):
        monkeypatch.setattr("leanvocab.cli.count.count_data", lambda *_, error=error: (_ for _ in ()).throw(error))
        assert message in run("count", "data.csv", code=1).stderr
        assert message in json.loads(run("count", "data.csv", "--json", code=1).stdout)["error"]["message"]


def test_a_disk_that_is_too_small_is_said_before_anything_is_loaded(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 10**5, 10**5))
    monkeypatch.setattr("leanvocab.finetune.job.find_pretrained", pytest.fail)
    with pytest.raises(
        CheckpointError,
        match=r"the model with 5 checkpoints will take about 0\.0 GB in .*out, and 0\.0 GB are free there; free",
    ):
        finetune(base, data, tmp_path / "out", settings())


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_loaded(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leanvocab.finetune.job.find_pretrained", pytest.fail)
    monkeypatch.setattr(
        "tempfile.TemporaryFile", lambda dir: (_ for _ in ()).throw(OSError(30, "Read-only file system"))
    )
    with pytest.raises(CheckpointError, match=r"cannot write to .*: Read-only file system; name another folder"):
        finetune(base, data, tmp_path / "new/out", settings())
    assert not (tmp_path / "new").exists()
