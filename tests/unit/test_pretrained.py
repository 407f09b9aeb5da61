"""Where a model that trains in few bits is loaded, and how long its texts may be."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from texts import save_language_model, save_pretrained, small_tokenizer

from leanvocab.errors import SettingsError
from leanvocab.finetune import pretrained
from leanvocab.finetune.pretrained import Pretrained, estimate_run, find_pretrained, training_step
from leanvocab.finetune.settings import FineTuneSettings


@pytest.mark.parametrize(
    ("on_cpu", "at_hand", "expected"), [(True, True, "cpu"), (False, True, 0), (False, False, "cpu")]
)
def test_four_bits_are_loaded_where_the_model_trains(
    on_cpu: bool, at_hand: bool, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`leanvocab finetune --cpu --qlora` where there is a GPU: the weights are not on it."""
    given: dict[str, Any] = {}
    auto_class = SimpleNamespace(from_pretrained=lambda name, **options: (given.update(options), {"missing_keys": []}))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(pretrained, "accelerator_at_hand", lambda: torch.device("cuda") if at_hand else None)
    task: Any = SimpleNamespace(set_labels=lambda config: None, has_new_head=False, replaces_head=False)
    Pretrained("a model", None, None, auto_class, ()).load(task, few_bits=True, on_cpu=on_cpu)
    assert given["device_map"] == {"": expected}


@pytest.mark.parametrize(
    ("family", "most"),
    [("Roberta", 18), ("XLMRoberta", 18), ("Camembert", 18), ("MPNet", 18), ("Bert", 20), ("DistilBert", 20)],
)
def test_the_longest_text_is_one_that_the_model_takes(family: str, most: int, tmp_path: Path) -> None:
    """Positions of RoBERTa's kin begin behind the padding's."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=400,
        max_position_embeddings=20,
        pad_token_id=1,
        **sizes,
        **({"dim": 16, "n_layers": 1, "n_heads": 2} if family == "DistilBert" else {}),
    )
    config.save_pretrained(tmp_path)
    tokenizer = small_tokenizer()
    tokenizer.model_max_length = 1000
    tokenizer.save_pretrained(tmp_path)
    network = transformers.AutoModel.from_config(config)
    network(torch.full((1, most), 7))
    with pytest.raises((IndexError, RuntimeError)):
        network(torch.full((1, most + 1), 7))
    assert find_pretrained(tmp_path, FineTuneSettings(max_length=most), -1).config.model_type == config.model_type
    with pytest.raises(SettingsError, match=f"max_length is {most + 1}, but the model takes {most} tokens at most"):
        find_pretrained(tmp_path, FineTuneSettings(max_length=most + 1), -1)


@pytest.mark.parametrize("task", ["classification", "masked-lm"])
def test_a_default_length_is_at_most_what_the_model_takes_and_said(task: str, tmp_path: Path) -> None:
    """RoBERTa with 129 positions takes 127 tokens; with the defaults it was refused, for a length that nobody had named."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.RobertaConfig(vocab_size=305, max_position_embeddings=129, pad_token_id=1, **sizes)
    save_pretrained(tmp_path, transformers.RobertaForMaskedLM(config))
    settings = FineTuneSettings(task=task)
    made = find_pretrained(tmp_path, settings, -1)
    assert made.lengths == {"max_length": 127}
    assert made.notes == (
        f"The model takes 127 tokens at most, so that max_length is 127, and not {settings.max_length}.",
    )
    assert estimate_run(config, 100, settings, training_step(settings, on_cpu=True)).step.length == 127


def test_a_default_length_of_targets_gives_way_too(tmp_path: Path) -> None:
    save_language_model(tmp_path, "bart", max_position_embeddings=30)
    made = find_pretrained(tmp_path, FineTuneSettings(task="seq2seq-lm"), -1)
    assert made.lengths == {"max_length": 30, "max_target_length": 30}
