"""What the installed transformers has or lacks, asked of itself, for tests that are about it."""

import dataclasses
import functools
import warnings

import datasets
import pytest
import torch
import transformers.trainer_utils
from transformers import CONFIG_MAPPING, BertConfig, BertModel, LlamaConfig, LlamaModel

from leanvocab.checkpoints.tensor_names import names_when_saved

# Its name until datasets 4.
ListFeature = datasets.List if hasattr(datasets, "List") else datasets.Sequence

# Configs are dataclasses, whose fields are checked when one is read; before, what is no number is found when a model is built.
CONFIGS_ARE_CHECKED = dataclasses.is_dataclass(BertConfig)

configs_stand_in_text = pytest.mark.skipif(
    not CONFIGS_ARE_CHECKED, reason="configs of this transformers are made by code, which is not read"
)

# torch hides this warning itself while it compiles, but from no filter that makes errors of warnings; later ones ask otherwise.
compiling = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

# Before, a Trainer took an end of sequence that the tokenizer lacks out of the config, in which BART and T5 look for it.
TRAINER_KEEPS_SPECIAL_IDS = hasattr(transformers.trainer_utils, "_align_special_token")


@functools.cache
def computes_on_meta() -> bool:
    """True where a model gives shapes on the meta device; transformers 5.0 asks there for autocast, which has no meta."""
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with torch.device("meta"):
        try:
            LlamaModel(config)(input_ids=torch.zeros(1, 2, dtype=torch.long))
        except RuntimeError:
            return False
    return True


@functools.cache
def trainer_finds_layer_norms() -> bool:
    """True where a BERT that was loaded is saved under the names that a Trainer looks for when it resumes: not until 5.3."""
    config = BertConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    state = BertModel(config).state_dict()
    return not names_when_saved(BertModel.from_pretrained(None, config=config, state_dict=state))


def needs_model_type(name: str) -> pytest.MarkDecorator:
    """Skips by name where transformers maps no config to a `model_type`: a folder of it cannot be read there."""
    return pytest.mark.skipif(
        name not in CONFIG_MAPPING, reason=f"this transformers reads no config of the type {name}"
    )


def hear_of_sparse_checks() -> None:
    """Lets torch 2.11 say, as it does once in a process, that invariants are not checked; where the caller said it, too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled")
        torch.sparse_coo_tensor([[0]], [1.0], (1,), check_invariants=False, device="cpu")
