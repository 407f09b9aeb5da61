"""Trainer checkpoints: byte for byte those of an ordinary run, and resumed from in every way, each in a fresh process."""

import concurrent.futures
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FULL_SIZE, small_lm, small_model, used_vocabulary
from own_process import in_own_process
from references import lm_vocabulary
from trainer_run import trainer_run
from transformers import Trainer, TrainingArguments

import leanvocab as lv
from leanvocab.errors import AlreadyShrunkError, NotShrunkError, OptimizerError
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary
from versions import trainer_finds_layer_norms

BYTE_IDENTICAL = {
    "model.safetensors",
    "config.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
}
ALL_IDS = list(range(500))


def run(**options: Any) -> dict[str, Any]:
    result: dict[str, Any] = in_own_process(trainer_run, options)  # wrong shapes would end it
    return result


def run_all(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(runs, pool.map(lambda options: run(**options), runs.values()), strict=True))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same_files(first: Path, second: Path) -> list[str]:
    """Names of files that are not the same in both folders, but for the path of the run itself and its clock."""
    left, right = files(first), files(second)
    for each, folder in ((left, first.parent), (right, second.parent)):
        each.pop("training_args.bin", None)  # a pickle with that path in it
        if "trainer_state.json" in each:
            each["trainer_state.json"] = without_clock(each["trainer_state.json"].replace(str(folder).encode(), b""))
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


def without_clock(state: bytes) -> bytes:
    content = json.loads(state)
    for entry in content["log_history"]:
        for clock in ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second"):
            entry.pop(clock, None)
    return json.dumps(content).encode()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """An ordinary run and shrunk ones, eight steps each, with a checkpoint every two."""
    folder = tmp_path_factory.mktemp("runs")
    small_model().save_pretrained(folder / "base")
    base = str(folder / "base")
    options = {
        "full": {"library": False},
        "shrunk": {"token_ids": "used"},
        "full-best": {"best": True},
        "shrunk-best": {"token_ids": "used", "best": True},
        "full-decay": {"decay": 0.1},
        "shrunk-decay": {"token_ids": "used", "decay": 0.1},
    }
    return folder, run_all(
        {name: {"base": base, "output": str(folder / name), **each} for name, each in options.items()}
    )


@pytest.mark.parametrize("kind", ["", "-best", "-decay"])
def test_every_checkpoint_and_the_final_model_are_byte_for_byte_those_of_an_ordinary_run(
    runs: tuple[Path, dict[str, dict[str, Any]]], kind: str
) -> None:
    folder, results = runs
    assert results[f"full{kind}"] == results[f"shrunk{kind}"]
    assert len(results[f"full{kind}"]["losses"]) == 8
    for step in (2, 4, 6, 8):
        ordinary = folder / f"full{kind}" / f"checkpoint-{step}"
        assert files(ordinary).keys() >= BYTE_IDENTICAL
        assert same_files(ordinary, folder / f"shrunk{kind}" / f"checkpoint-{step}") == []
    assert same_files(folder / f"full{kind}" / "final", folder / f"shrunk{kind}" / "final") == []


@pytest.mark.skipif(
    not trainer_finds_layer_norms(), reason="this transformers resumes an ordinary run with other norms"
)
def test_a_run_is_resumed_from_any_checkpoint_in_any_kind_of_run(runs: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    folder, results = runs
    base = str(folder / "base")
    seen = json.loads(json.dumps(ALL_IDS))
    resumes = {
        "shrunk from its own": {"resume": folder / "shrunk" / "checkpoint-4", "token_ids": "used"},
        "ordinary, leanvocab not installed": {"resume": folder / "shrunk" / "checkpoint-4", "library": False},
        "a larger vocabulary": {"resume": folder / "shrunk" / "checkpoint-4", "token_ids": seen[:499]},
        "every row kept": {"resume": folder / "shrunk" / "checkpoint-4", "token_ids": seen},
        "an ordinary run's checkpoint in a shrunk run": {
            "resume": folder / "full" / "checkpoint-4",
            "token_ids": "used",
        },
        "with decay, from its own": {
            "resume": folder / "shrunk-decay" / "checkpoint-4",
            "token_ids": "used",
            "decay": 0.1,
        },
        "with decay, ordinary": {"resume": folder / "shrunk-decay" / "checkpoint-4", "decay": 0.1, "library": False},
        "with decay, an ordinary run's": {
            "resume": folder / "full-decay" / "checkpoint-4",
            "token_ids": "used",
            "decay": 0.1,
        },
    }
    names = {name: name.replace(" ", "-").replace(",", "").replace("'", "") for name in resumes}
    resumed = run_all(
        {
            name: {"base": base, "output": str(folder / names[name]), **each, "resume": str(each["resume"])}
            for name, each in resumes.items()
        }
    )
    for name, result in resumed.items():
        kind = "full-decay" if "decay" in name else "full"
        assert "error" not in result, (name, result)
        assert result["losses"] == results[kind]["losses"], name
        wrong = same_files(folder / kind / "checkpoint-8", folder / names[name] / "checkpoint-8")
        assert set(wrong) <= {"trainer_state.json"}, (
            name
        )  # a resumed run's log may differ in what it says of the resume
        assert same_files(folder / kind / "final", folder / names[name] / "final") == []


def test_resuming_with_a_vocabulary_that_lacks_trained_rows_is_refused_before_a_step(
    runs: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    folder, _ = runs
    generator = torch.Generator().manual_seed(7)
    used = torch.randint(3, 500, (32, 12), generator=generator).unique().tolist()
    unused = next(i for i in range(500) if i not in used)
    others = {"smaller": used[:-1], "of the same size": [*used[:-1], unused]}
    results = run_all(
        {
            name: {
                "base": str(folder / "base"),
                "output": str(folder / f"other-{len(name)}"),
                "token_ids": sorted(ids),
                "resume": str(folder / "shrunk" / "checkpoint-4"),
            }
            for name, ids in others.items()
        }
    )
    for result in results.values():
        assert result["error"] in ("OptimizerError", "MissingTokenError"), result
        assert not list(folder.glob("other-*/checkpoint-6"))
    assert (
        "ordinary training would go on moving those rows"
        in results["smaller"]["message"] + results["of the same size"]["message"]
    )


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(str(folder), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, **options)


def rows() -> list[dict[str, Any]]:
    from models import batch

    inputs = batch()
    return [{"input_ids": i, "labels": label} for i, label in zip(inputs["input_ids"], inputs["labels"], strict=True)]


def test_the_callback_shrinks_the_trainers_model(tmp_path: Path) -> None:
    model = small_model()
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=rows(),
        callbacks=[lv.LeanVocabCallback(used_vocabulary(), on_missing="error")],
    )
    assert lv.status(model).tables[0].on_missing == "error"
    trainer.train()
    assert lv.status(model)


def test_the_callback_says_where_to_shrink_a_model_that_the_trainer_makes_itself(tmp_path: Path) -> None:
    """`train` calls `model_init` again, so that the model that the callback shrank is not the one that is trained."""
    callback = lv.LeanVocabCallback(used_vocabulary())
    trainer = Trainer(
        model_init=lambda: small_model(), args=arguments(tmp_path), train_dataset=rows(), callbacks=[callback]
    )
    with pytest.raises(
        NotShrunkError, match=r"made another model since \(model_init\): call shrink_\(.*\) within model_init"
    ):
        trainer.train()


def test_a_callback_that_comes_after_the_trainer_was_made_is_told_so(tmp_path: Path) -> None:
    trainer = Trainer(small_model(), arguments(tmp_path), train_dataset=rows())
    trainer.add_callback(lv.LeanVocabCallback(used_vocabulary()))
    with pytest.raises(
        NotShrunkError, match=r"came after the Trainer was made \(add_callback\): give it with callbacks="
    ):
        trainer.train()


def trainer_with(model: Any, folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    return Trainer(model, arguments(folder), train_dataset=rows(), callbacks=list(callbacks), **options)


OTHER = PartialVocabulary(range(80), FULL_SIZE)
ASKED = "is shrunk already, and in another way than was asked for: "


def test_another_vocabulary_than_the_model_has_is_an_error_when_the_trainer_is_made(tmp_path: Path) -> None:
    model = lv.shrink_(small_model(), used_vocabulary())
    message = (
        rf"{ASKED}roberta\.\S+ has \d+ rows \(digest \w{{12}}…\), asked for 80 \(digest .*Call merge_\(model\) first"
    )
    with pytest.raises(AlreadyShrunkError, match=message):
        trainer_with(model, tmp_path, lv.LeanVocabCallback(OTHER))
    with pytest.raises(AlreadyShrunkError, match="asked for 80"):
        trainer_with(small_model(), tmp_path, lv.LeanVocabCallback(used_vocabulary()), lv.LeanVocabCallback(OTHER))
    trainer_with(model, tmp_path, lv.LeanVocabCallback(), lv.LeanVocabCallback(used_vocabulary())).train()


@pytest.mark.parametrize(
    ("has", "asked"),
    [
        ({"output": "frozen"}, {"output": "restricted"}),
        ({}, {"output": "restricted"}),
        ({"frozen_rows": "device"}, {"frozen_rows": "host"}),
        ({"frozen_rows": "host"}, {"frozen_rows": "device"}),
        ({"on_missing": "base"}, {"on_missing": "error"}),
        ({}, {"ids": "partial"}),
        ({"output": "restricted"}, {"output": "restricted", "decay_unused_rows": True}),
        ({}, {"store_dir": "elsewhere"}),
        ({}, {"embedding": "model.another_table"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*which is another objective:leanvocab.errors.LeanVocabWarning")
def test_other_options_than_the_model_has_are_an_error_with_and_without_a_vocabulary(
    tmp_path: Path, has: dict[str, Any], asked: dict[str, Any]
) -> None:
    model = lv.shrink_(small_lm("llama-tied"), lm_vocabulary(), **has)
    name = list(asked)[-1]
    for vocabulary in (lm_vocabulary(), None):
        with pytest.raises(
            AlreadyShrunkError, match=rf"{ASKED}.*(it has {name}=.*, asked for|its tables are .*, asked for)"
        ):
            trainer_with(model, tmp_path, lv.LeanVocabCallback(vocabulary, **asked))


@pytest.mark.parametrize(
    ("family", "has", "asked"),
    [
        ("llama-tied", {}, {}),
        ("llama-tied", {}, {"output": "frozen", "frozen_rows": "device", "on_missing": None, "ids": "full"}),
        ("llama-tied", {"frozen_rows": "host", "on_missing": "base"}, {"frozen_rows": "host", "on_missing": "base"}),
        ("llama-tied", {"frozen_rows": "host"}, {}),
        ("llama-untied", {}, {"output": "full", "frozen_rows": "host", "decay_unused_rows": False}),
        ("llama-untied", {"output": "frozen"}, {"output": "frozen", "embedding": "model.embed_tokens"}),
    ],
)
def test_what_the_model_has_may_be_asked_for_again(
    tmp_path: Path, family: str, has: dict[str, Any], asked: dict[str, Any]
) -> None:
    model = lv.shrink_(small_lm(family), lm_vocabulary(), **has)
    rebuilt = PartialVocabulary([*lm_vocabulary()], FULL_SIZE)
    trainer_with(model, tmp_path, lv.LeanVocabCallback(rebuilt, **asked))
    trainer_with(model, tmp_path, lv.LeanVocabCallback({"model.embed_tokens": rebuilt}, **asked))


def test_tables_by_name_are_compared_and_a_table_that_is_whole_is_missed(tmp_path: Path) -> None:
    table, kept = "roberta.embeddings.word_embeddings", used_vocabulary()
    model = lv.shrink_(small_model(), kept)
    trainer_with(model, tmp_path, lv.LeanVocabCallback({table: kept}))
    positions = PartialVocabulary(range(9), 512)
    with pytest.raises(AlreadyShrunkError, match=f"{ASKED}roberta.embeddings.position_embeddings is whole"):
        trainer_with(
            model, tmp_path, lv.LeanVocabCallback({table: kept, "roberta.embeddings.position_embeddings": positions})
        )
    with pytest.raises(AlreadyShrunkError, match=rf"{table} has \d+ rows \(digest .*\), asked for all"):
        trainer_with(model, tmp_path, lv.LeanVocabCallback({"roberta.embeddings.position_embeddings": positions}))


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning"  # peft 0.21 reads a name that transformers 5.23 has deprecated
)
def test_adapters_around_a_shrunk_model_are_looked_through(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = lv.shrink_(small_lm("llama-untied"), lm_vocabulary())
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    for vocabulary in (lm_vocabulary(), {"model.embed_tokens": lm_vocabulary()}):
        trainer_with(adapted, tmp_path, lv.LeanVocabCallback(vocabulary))
        with pytest.raises(AlreadyShrunkError, match="asked for 80"):
            trainer_with(adapted, tmp_path, lv.LeanVocabCallback(OTHER))


def test_a_model_that_the_trainer_makes_anew_is_looked_at_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is freed may leave its id to the next model.
    monkeypatch.setattr("leanvocab.trainers.callback.id", lambda _: 1, raising=False)
    vocabularies = iter([used_vocabulary(), used_vocabulary(), OTHER])
    make = {"model_init": lambda: lv.shrink_(small_model(), next(vocabularies))}
    callback = lv.LeanVocabCallback(used_vocabulary())
    trainer = trainer_with(None, tmp_path, callback, **make)
    trainer.train()
    assert pickle.loads(pickle.dumps(callback)).vocabulary == used_vocabulary()
    with pytest.raises(AlreadyShrunkError, match=r"asked for \d+ \(digest"):
        trainer.train()


def test_an_option_that_shrinking_does_not_have_is_an_error_where_it_is_given() -> None:
    with pytest.raises(TypeError, match="outptu"):
        lv.LeanVocabCallback(used_vocabulary(), outptu="restricted")


def test_deltas_of_slow_weights_are_refused_before_a_step(tmp_path: Path) -> None:
    class SlowWeights(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for weight in self.param_groups[0]["params"]:
                self.state[weight].setdefault("slow", weight.detach().clone())
            super().step(closure)

    small_model().save_pretrained(tmp_path / "base")
    model = lv.shrink_(type(small_model()).from_pretrained(tmp_path / "base"), used_vocabulary())
    optimizer = SlowWeights(model.parameters(), lr=0.1)
    callback = lv.LeanVocabCallback(checkpoints="delta")
    trainer = Trainer(
        model, arguments(tmp_path / "run"), train_dataset=rows(), callbacks=[callback], optimizers=(optimizer, None)
    )
    with pytest.raises(
        OptimizerError, match=r"SlowWeights keeps a copy of each row \('slow'\), which a delta does not hold"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_callback_refuses_an_optimizer_that_does_not_hold_the_partial_table(tmp_path: Path) -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    lv.shrink_(model, used_vocabulary())
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=rows(),
        callbacks=[lv.LeanVocabCallback()],
        optimizers=(optimizer, None),
    )
    with pytest.raises(OptimizerError, match="does not hold the partial table"):
        trainer.train()


def test_an_optimizer_that_mixes_rows_is_announced_in_a_trainer_without_any_callback(tmp_path: Path) -> None:
    model = lv.shrink_(small_model(), used_vocabulary())
    trainer = Trainer(model, arguments(tmp_path, optim="adafactor"), train_dataset=rows())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert len([w for w in caught if "Adafactor is not row-separable" in str(w.message)]) == 1
