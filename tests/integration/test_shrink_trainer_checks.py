"""`shrink_trainer_` and the callback without a vocabulary: what is counted, what grows, and what is refused before long work."""

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerator
import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.state import PartialState
from models import FULL_SIZE, small_lm, small_model
from torch import nn
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

import leanvocab as lv
from doors import models, trl
from leanvocab.errors import AlreadyShrunkError, DataError, ModelError, NotShrunkError, SettingsError


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = {"max_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return TrainingArguments(str(folder), **defaults | options)


def trainer_of(folder: Path, model: Any = None, rows: Any = None, **options: Any) -> Trainer:
    args = options.pop("args", None) or arguments(folder)
    rows = models.examples() if rows is None else rows
    return Trainer(small_model() if model is None else model, args, train_dataset=rows, **options)


def kept(model: nn.Module) -> set[int]:
    return set(model.get_input_embeddings().table.vocabulary.token_ids.tolist())


def ids_of(rows: list[dict[str, Any]]) -> set[int]:
    return {int(token_id) for row in rows for token_id in row["input_ids"]}


# --- what is counted ---------------------------------------------------------------------------------------------------


def test_the_data_for_evaluation_are_counted_too_each_of_several(tmp_path: Path) -> None:
    rows = models.examples()
    evaluated = {name: [{**rows[0], "input_ids": torch.full((12,), token)}] for name, token in (("a", 411), ("b", 412))}
    trainer = trainer_of(tmp_path, rows=rows, eval_dataset=evaluated)
    lv.shrink_trainer_(trainer)
    assert {411, 412} | ids_of(rows) <= kept(trainer.model)


def test_a_transform_is_run_and_its_token_ids_are_counted(tmp_path: Path) -> None:
    def tokenized(batch: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": [[len(text) + 400] * 12 for text in batch["text"]], "labels": [0] * len(batch["text"])}

    rows = datasets.Dataset.from_dict({"text": ["a", "bb", "ccc"]}).with_transform(tokenized)
    trainer = trainer_of(tmp_path, rows=rows, args=arguments(tmp_path, remove_unused_columns=False))
    lv.shrink_trainer_(trainer)
    assert {401, 402, 403} <= kept(trainer.model)


def collated(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Tokenizes, and draws random numbers of each kind."""
    random.random(), np.random.rand(), torch.rand(1)
    ids = torch.tensor([[0, len(row["text"]) + 400, 2] for row in rows])
    return {"input_ids": ids, "labels": torch.zeros(len(rows), dtype=torch.long)}


def test_texts_are_counted_through_the_trainers_own_collator_whose_random_draws_are_given_back(tmp_path: Path) -> None:
    rows = [{"text": "a" * length} for length in range(1, 100)]
    args = arguments(tmp_path, remove_unused_columns=False)
    trainer = trainer_of(tmp_path, rows=rows, args=args, data_collator=collated)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    lv.shrink_trainer_(trainer)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert set(range(401, 500)) <= kept(trainer.model)
    assert not set(range(300, 400)) & kept(trainer.model)
    trainer.train()


def test_classes_of_several_labels_are_no_token_ids(tmp_path: Path) -> None:
    rows = [{"text": "a", "labels": [411, 412]}]

    def with_ids(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return collated(rows) | {"labels": torch.tensor([row["labels"] for row in rows])}

    args = arguments(tmp_path, remove_unused_columns=False)
    trainer = trainer_of(tmp_path, rows=datasets.Dataset.from_list(rows), args=args, data_collator=with_ids)
    lv.shrink_trainer_(trainer)
    assert 401 in kept(trainer.model)


class Unreadable(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, number: int) -> Any:
        raise AssertionError("it was read")


def test_a_vocabulary_and_options_of_shrink_are_used_and_nothing_is_read(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, small_lm("llama-untied"), Unreadable())
    vocabulary = lv.PartialVocabulary(range(80), FULL_SIZE)
    table = lv.shrink_trainer_(trainer, vocabulary=vocabulary, on_missing="base", output="frozen").tables[0]
    assert (table.digest, table.on_missing) == (vocabulary.digest, "base")
    with pytest.raises(TypeError, match="unexpected keyword argument 'outputs'"):
        lv.shrink_trainer_(trainer_of(tmp_path), outputs="frozen")
    with pytest.raises(TypeError, match="optimizer"):
        lv.shrink_trainer_(trainer_of(tmp_path), optimizer=None)


# --- what grows ----------------------------------------------------------------------------------------------------------


def streamed() -> Any:
    rows = [{name: value.tolist() for name, value in row.items()} for row in models.examples()]
    return datasets.Dataset.from_list(rows).to_iterable_dataset()


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from models.examples()


@pytest.mark.parametrize("stream", [streamed, Stream])
def test_a_stream_gets_rows_as_its_ids_come(stream: Any, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, rows=stream())
    began = lv.shrink_trainer_(trainer).tables[0]
    assert began.on_missing == "extend"
    trainer.train()
    assert lv.status(trainer.model).tables[0].num_rows > began.num_rows


def test_a_stream_for_evaluation_alone_is_served_from_the_base(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, eval_dataset=streamed())
    assert lv.shrink_trainer_(trainer).tables[0].on_missing is None
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize(("replaces", "grows"), [(0.1, "extend"), (0.0, None)])
def test_words_that_a_collator_draws_get_their_rows(replaces: float, grows: str | None, tmp_path: Path) -> None:
    tokenizer = trl.tokenizer()
    tokenizer.add_special_tokens({"mask_token": "w4"})
    collator = DataCollatorForLanguageModeling(tokenizer, mask_replace_prob=0.8, random_replace_prob=replaces)
    rows = [{"input_ids": row["input_ids"].tolist()} for row in models.examples()]
    trainer = trainer_of(tmp_path, small_lm("roberta"), rows, data_collator=collator)
    assert lv.shrink_trainer_(trainer, output="full" if grows is None else None).tables[0].on_missing == grows


@pytest.mark.parametrize(
    ("options", "around"),
    [({"torch_compile": True}, "torch.compile"), ({}, "DistributedDataParallel")],
    ids=["compile", "DDP"],
)
def test_rows_that_cannot_come_under_what_is_around_the_model_are_refused_at_once(
    options: dict[str, Any], around: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tmp_path, rows=streamed(), args=arguments(tmp_path, **options))
    if not options:
        in_several_processes(monkeypatch)
    message = rf"train_dataset is a stream: rows would have to come .* under {around}.*vocabulary="
    with pytest.raises(SettingsError, match=message):
        lv.shrink_trainer_(trainer)
    assert not lv.status(trainer.model)
    lv.shrink_trainer_(trainer, vocabulary=models.vocabulary())


def in_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils import DistributedType

    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.MULTI_CPU)


# --- what is refused -----------------------------------------------------------------------------------------------------


def test_a_second_call_checks_that_the_model_is_as_asked_for(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    first = lv.shrink_trainer_(trainer)
    assert lv.shrink_trainer_(trainer) == first
    with pytest.raises(AlreadyShrunkError, match="asked for 80"):
        lv.shrink_trainer_(trainer, vocabulary=lv.PartialVocabulary(range(80), FULL_SIZE))


def test_an_optimizer_that_is_there_already_goes_on_with_its_states(tmp_path: Path) -> None:
    """Two steps, shrunk, and two more: as four without."""
    results = []
    for shrinks in (False, True):
        torch.manual_seed(0)
        trainer = trainer_of(tmp_path, args=arguments(tmp_path, lr_scheduler_type="constant"))
        trainer.train()
        if shrinks:
            lv.shrink_trainer_(trainer)
        trainer.train()
        results.append(trainer.model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_what_is_no_trainer_and_a_trainer_without_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"expected a Trainer of transformers .* got Roberta\w+, which has no model, args"
    ):
        lv.shrink_trainer_(small_model())
    with pytest.raises(SettingsError, match="has no train_dataset to count; make it with one, or give the vocabulary"):
        lv.shrink_trainer_(Trainer(small_model(), arguments(tmp_path)))
    with pytest.raises(SettingsError, match='ids="partial" is for data that a vocabulary has remapped'):
        lv.shrink_trainer_(trainer_of(tmp_path), ids="partial")
    with pytest.raises(DataError, match="nothing of the data can be counted: train_dataset is a stream"):
        lv.shrink_trainer_(trainer_of(tmp_path, rows=streamed()), on_missing="error")


def test_a_model_that_the_trainer_makes_later_is_refused_and_the_callback_shrinks_it(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    trainer = Trainer(model_init=lambda: small_model(), args=args, train_dataset=models.examples())
    with pytest.raises(
        SettingsError, match=r"\(model_init\).*within model_init, or give .*callbacks=\[LeanVocabCallback\(\)\]"
    ):
        lv.shrink_trainer_(trainer)
    trainer.add_callback(lv.LeanVocabCallback())
    trainer.train()
    assert lv.status(trainer.model)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # as torch.compile is imported
@pytest.mark.parametrize("wraps", [nn.DataParallel, torch.compile, "in place", "while it trained"])
def test_a_model_that_is_wrapped_or_compiled_is_refused(wraps: Any, tmp_path: Path) -> None:
    model = small_model()
    trainer = trainer_of(tmp_path, model)
    if wraps == "in place":
        model.compile()
    elif wraps == "while it trained":
        trainer.model_wrapped = nn.DataParallel(model)
    else:
        trainer.model = trainer.model_wrapped = wraps(model)
    with pytest.raises(ModelError, match=r"is wrapped or compiled already .* call shrink_trainer_ before train\(\)"):
        lv.shrink_trainer_(trainer)
    assert not lv.status(model)


def test_a_collator_that_fails_is_named_with_its_rows_and_nothing_has_changed(tmp_path: Path) -> None:
    def failing(rows: list[Any]) -> Any:
        random.random()
        raise KeyError("sentence")

    trainer = trainer_of(tmp_path, rows=[{"text": "a"}] * 3, data_collator=failing)
    before = random.getstate()
    with pytest.raises(
        DataError, match=r"cannot count train_dataset: its collator .* raised KeyError on rows 0 to 2: 'sentence'"
    ):
        lv.shrink_trainer_(trainer)
    assert random.getstate() == before
    assert not lv.status(trainer.model)


def test_what_cannot_be_counted_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = trl.tokenizer()
    tokenizer.add_special_tokens({"mask_token": "w4"})
    trainer = trainer_of(tmp_path, rows=Unreadable(), data_collator=DataCollatorForLanguageModeling(tokenizer))
    in_several_processes(monkeypatch)
    with pytest.raises(SettingsError, match="the collator of train_dataset draws words at random: rows would have to"):
        lv.shrink_trainer_(trainer)


def test_a_reference_model_that_follows_the_trained_one_cannot_grow(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, rows=streamed())
    trainer.args.sync_ref_model = True
    with pytest.raises(SettingsError, match=r"sync_ref_model copies .* cannot follow rows .*\(vocabulary=\)"):
        lv.shrink_trainer_(trainer)
    assert not lv.status(trainer.model)


def test_a_reference_model_of_another_kind_stays_as_it_is(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.ref_model = small_lm("llama-tied")
    lv.shrink_trainer_(trainer)
    assert not lv.status(trainer.ref_model)
    trainer = trainer_of(tmp_path)
    trainer.ref_model = copy.deepcopy(trainer.model)
    lv.shrink_trainer_(trainer)
    assert lv.status(trainer.ref_model).tables[0].on_missing == "base"


# --- the callback ----------------------------------------------------------------------------------------------------------


class Begun(TrainerCallback):
    """Notes what the model is when training has begun."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.status = lv.status(model)


@pytest.mark.parametrize("adds", [False, True], ids=["callbacks=", "add_callback"])
def test_the_callback_shrinks_when_training_begins_to_the_data_for_training(adds: bool, tmp_path: Path) -> None:
    by_line = trainer_of(tmp_path / "line")
    table = lv.shrink_trainer_(by_line).tables[0]
    by_line.train()
    begun = Begun()
    trainer = trainer_of(tmp_path / "callback", callbacks=[] if adds else [lv.LeanVocabCallback(), begun])
    if adds:
        trainer.add_callback(lv.LeanVocabCallback())
        trainer.add_callback(begun)
    assert not lv.status(trainer.model)
    trainer.train()
    assert begun.status.tables[0] == table
    left, right = by_line.model.state_dict(), trainer.model.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("around", ["torch.compile", "DistributedDataParallel"])
def test_where_the_callback_comes_too_late_it_names_the_line(
    around: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(tmp_path, torch_compile=around == "torch.compile")
    trainer = trainer_of(tmp_path, args=args)
    callback = lv.LeanVocabCallback()
    optimizer = trainer.create_optimizer()
    if around != "torch.compile":
        in_several_processes(monkeypatch)
    begin = {"model": trainer.model, "optimizer": optimizer, "train_dataloader": trainer.get_train_dataloader()}
    with pytest.raises(
        NotShrunkError, match=rf"under {around}.* it is too late .*call shrink_trainer_\(trainer\) before"
    ):
        callback.on_train_begin(args, trainer.state, trainer.control, **begin)
    lv.shrink_trainer_(trainer)  # before the optimizer is made, or handed over
    callback.on_train_begin(args, trainer.state, trainer.control, **begin)


@pytest.mark.skipif(not accelerator.can_be_emulated(), reason="torch can emulate a device from 2.13 on")
def test_the_one_line_lets_rows_come_as_the_loader_gives_a_batch_too(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, rows=Stream())
    lv.shrink_trainer_(trainer)
    with accelerator.in_use():
        trainer.model.to(accelerator.NAME)
        loader = torch.utils.data.DataLoader(Stream(), batch_size=4)
        loader = prepare_data_loader(loader, device=torch.device(accelerator.NAME), put_on_device=True)
        trainer.callback_handler.train_dataloader = loader
        began = lv.status(trainer.model).tables[0].num_rows
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
        trainer.model.train()
        next(iter(loader))
        assert lv.status(trainer.model).tables[0].num_rows > began


@pytest.mark.skipif(not accelerator.can_be_emulated(), reason="torch can emulate a device from 2.13 on")
@pytest.mark.parametrize("generates", [False, True], ids=["trains on its data", "generates"])
def test_on_a_device_rows_come_as_the_loader_gives_a_batch_that_shows_all_ids(generates: bool, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    if generates:
        args.temperature = 1.0
    callback = lv.LeanVocabCallback()
    with accelerator.in_use():
        model = lv.shrink_(small_model().to(accelerator.NAME), on_missing="extend")
        loader = torch.utils.data.DataLoader(Stream(), batch_size=4)
        loader = prepare_data_loader(loader, device=torch.device(accelerator.NAME), put_on_device=True)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
        begin = {"model": model, "optimizer": optimizer, "train_dataloader": loader}
        callback.on_train_begin(args, None, None, **begin)
        began = lv.status(model).tables[0].num_rows
        model.train()
        next(iter(loader))
        assert (lv.status(model).tables[0].num_rows > began) == (not generates)
