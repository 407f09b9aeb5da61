"""What a run of `finetune` leaves on the disk: full models, deltas, checkpoints of either kind or none, whole or not at all."""

import os
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from disk import content, read_all
from ended_runs import at_step, settings, weights
from runs import run, text_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from leanvocab.checkpoints.delta_format import TENSORS, is_delta
from leanvocab.checkpoints.merge import merge_checkpoint
from leanvocab.errors import DataError, InterruptedRunError, LeanVocabError, SettingsError
from leanvocab.finetune.earlier_runs import last_whole
from leanvocab.finetune.job import finetune
from leanvocab.finetune.settings import FineTuneSettings
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary


@pytest.mark.parametrize("step", [1, 7])
def test_delta_checkpoints_are_gone_on_from_to_the_same_bits(
    base: Path, data: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    at_step(monkeypatch, step, lambda loss: (os.kill(os.getpid(), signal.SIGTERM), loss)[1])
    with pytest.raises(InterruptedRunError):
        finetune(base, data, tmp_path / "out", settings(checkpoints="delta"))
    last = last_whole(tmp_path / "out/checkpoints")
    assert last is not None
    assert is_delta(last)
    resumed = finetune(base, data, tmp_path / "out", settings(checkpoints="delta", resume=True))
    assert weights(tmp_path / "out") == weights(whole.output_dir)
    assert (resumed.losses, resumed.scores) == (whole.losses, whole.scores)


def test_a_run_goes_on_from_checkpoints_of_the_other_kind(
    base: Path, data: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for first, second, step in (("full", "delta", 2), ("delta", "full", 3)):
        at_step(monkeypatch, step, lambda loss: (os.kill(os.getpid(), signal.SIGINT), loss)[1])
        with pytest.raises(InterruptedRunError):
            finetune(base, data, tmp_path / first, settings(checkpoints=first))
        finetune(base, data, tmp_path / first, settings(checkpoints=second, resume=True))
        assert weights(tmp_path / first) == weights(whole.output_dir)


def test_the_best_of_delta_checkpoints_is_kept(base: Path, data: Path, tmp_path: Path) -> None:
    runs = {
        kind: finetune(base, data, tmp_path / kind, settings(checkpoints=kind, best="loss", learning_rate=0.1))
        for kind in ("full", "delta")
    }
    assert weights(tmp_path / "full") == weights(tmp_path / "delta")
    assert runs["full"].scores == runs["delta"].scores


def test_a_run_that_saves_a_delta_leaves_what_makes_the_full_model(
    base: Path, data: Path, whole: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    finetune(base, data, out, settings(checkpoints="delta", save="delta", save_total_limit=1))
    merge_checkpoint(base=base, delta=out, output=tmp_path / "merged", verify=True)
    assert weights(tmp_path / "merged") == weights(whole.output_dir)
    last = last_whole(out / "checkpoints")
    assert last is not None
    assert all((last / name).samefile(out / name) for name in (TENSORS, "tokenizer.json"))  # once on the disk
    assert AutoTokenizer.from_pretrained(out).vocab_size == AutoTokenizer.from_pretrained(base).vocab_size
    with pytest.raises(ValueError, match="leanvocab merge"):
        AutoModelForSequenceClassification.from_pretrained(out)


def test_the_command_says_what_to_do_with_what_it_left(base: Path, data: Path, tmp_path: Path) -> None:
    words = ["finetune", base, data, "--cpu", "--epochs", 1, "-o"]
    assert f'pipeline("text-classification", "{tmp_path / "full"}")' in text_of(*words, tmp_path / "full")
    printed = text_of(*words, tmp_path / "delta", "--save", "delta")
    assert f"leanvocab merge {base} {tmp_path / 'delta'} OUTPUT" in printed


def test_another_kind_of_result_takes_the_place_of_the_earlier_one(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for kind in ("full", "delta", "full"):
        finetune(base, data, out, settings(save=kind, overwrite=True, epochs=1))
        assert is_delta(out) == (kind == "delta")
        assert (out / "model.safetensors").exists() == (kind == "full")
        assert (out / TENSORS).exists() == (kind == "delta")
    AutoModelForSequenceClassification.from_pretrained(out)


def test_without_checkpoints_none_are_left(base: Path, data: Path, whole: Any, tmp_path: Path) -> None:
    finetune(base, data, tmp_path / "out", settings(checkpoints="none"))
    assert not (tmp_path / "out/checkpoints").exists()
    assert weights(tmp_path / "out") == weights(whole.output_dir)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"checkpoints": "none", "best": "loss"}, "best needs a checkpoint at each validation.*checkpoints='none'"),
        ({"checkpoints": "delta", "full_vocabulary": True}, "checkpoints='delta' .*full_vocabulary trains every row"),
        ({"save": "delta", "lora": True}, "save='delta' .*LoRA saves adapters"),
        ({"vocabulary": "v.json", "full_vocabulary": True}, "full_vocabulary .*vocabulary='v.json' has no meaning"),
        ({"checkpoints": "all"}, "checkpoints must be one of full, delta, none"),
    ],
)
def test_knobs_that_contradict_each_other_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        settings(**knobs)


def test_a_vocabulary_that_was_counted_before_is_taken(base: Path, data: Path, whole: Any, tmp_path: Path) -> None:
    run("count", data, "--tokenizer", base, "-o", tmp_path / "v.json")
    counted = PartialVocabulary.load(tmp_path / "v.json")
    wider = PartialVocabulary([*counted.token_ids.tolist(), 290, 291], counted.full_size)
    wider.save(tmp_path / "wider.json")
    for name in ("v.json", "wider.json"):
        result = finetune(base, data, tmp_path / name[:-5], settings(vocabulary=str(tmp_path / name)))
        assert result.vocabulary == PartialVocabulary.load(tmp_path / name)
        assert read_all(tmp_path / name[:-5]).keys() == read_all(whole.output_dir).keys()
        assert weights(tmp_path / name[:-5]) == weights(whole.output_dir)


def test_a_vocabulary_that_lacks_rows_of_the_data_is_refused_before_training(
    base: Path, data: Path, whole: Any, tmp_path: Path
) -> None:
    ids = whole.vocabulary.token_ids.tolist()
    cases: dict[str, tuple[PartialVocabulary, type[LeanVocabError], str]] = {
        "few": (
            PartialVocabulary(ids[:-2], whole.vocabulary.full_size),
            DataError,
            r"lacks 2 of the .* \d+ \(word\d+\)",
        ),
        "special": (PartialVocabulary(ids[1:], whole.vocabulary.full_size), DataError, r"lacks 1 of .*0 \(\[PAD\]\)"),
        "other": (PartialVocabulary(ids, 9999), DataError, r"is of 9,999 rows, and the model has"),
    }
    for name, (vocabulary, error, message) in cases.items():
        vocabulary.save(tmp_path / name)
        before = content(tmp_path)
        with pytest.raises(error, match=message):
            finetune(base, data, tmp_path / "out", settings(vocabulary=str(tmp_path / name)))
        assert content(tmp_path) == before


@pytest.mark.slow
def test_a_run_with_deltas_leaves_little_more_than_what_was_trained_and_its_states(
    shared: Path, repository: Path, tmp_path: Path
) -> None:
    base = repository / ".cache/models/e5-small"
    if not base.exists():
        pytest.skip("no e5-small: shared/tools/fetch_models.py .cache/models e5-small")
    rows = pq.read_table(shared / "data/glue/cola.train.parquet").slice(0, 64)
    pq.write_table(rows, tmp_path / "train.parquet")
    result = finetune(
        base,
        tmp_path / "train.parquet",
        tmp_path / "out",
        FineTuneSettings(text_columns=("sentence",), epochs=1, max_length=32, checkpoints="delta", save="delta"),
    )
    left = sum(
        {each.stat().st_ino: each.stat().st_size for each in (tmp_path / "out").rglob("*") if each.is_file()}.values()
    )
    ratio = left / (result.weights_bytes + result.optimizer_bytes)
    print(f"left {left:,} bytes, {ratio:.3f} of trained tensors and states")
    assert ratio <= 1.1
