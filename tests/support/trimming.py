"""A trimming on disk without its tokenizer, compared with the naive one: every tensor loaded and sliced."""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from comparing import same_bits
from safetensors.torch import load_file
from torch import Tensor

from leanvocab.files.headers import read_weights
from leanvocab.trimming.export import export_trimmed
from leanvocab.trimming.model_files import ModelFiles
from leanvocab.trimming.vocabulary_tensors import TrimmedTensor
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary


def trim(folder: Path, output: Path, ids: Iterable[int]) -> tuple[PartialVocabulary, dict[str, TrimmedTensor]]:
    """Writes `output` with these ids and those that the model needs; the kept ids, and the tensors that changed."""
    files = ModelFiles.read(folder)
    wanted = {token_id for token_id in ids if token_id < files.full_size} | set(files.required_ids().tolist())
    vocabulary = PartialVocabulary(sorted(wanted), files.full_size)
    changed = files.trimmed_tensors(read_weights(folder).shapes, files.new_ids(vocabulary))
    result = export_trimmed(folder, vocabulary, output, tokenizer=False, progress=False)
    assert (set(result.tensors), result.rows_for_model) == (set(changed), 0)
    full, lean = map(all_tensors, (folder, output))
    assert list(full) == list(lean)
    for name, tensor in full.items():
        for dim in changed[name].dims if name in changed else ():
            tensor = kept_of(tensor, dim, vocabulary)
        assert same_bits(tensor, lean[name])
    return vocabulary, changed


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Name → tensor of a checkpoint, by name."""
    return dict(sorted(chain.from_iterable(load_file(file.path).items() for file in read_weights(folder).files)))


def kept_of(tensor: Tensor, dim: int, vocabulary: PartialVocabulary) -> Tensor:
    """The kept ids' part of a dimension of a tensor."""
    ids = vocabulary.token_ids[vocabulary.token_ids < tensor.shape[dim]]
    return tensor.index_select(dim, torch.from_numpy(ids.copy()))


def new_ids_of(ids: Tensor, vocabulary: PartialVocabulary) -> Tensor:
    """Ids by their new numbers; -100 stays, and what lies beyond all ids does so still."""
    inside = ids < vocabulary.full_size
    partial: Tensor = vocabulary.to_partial(torch.where(inside, ids, -100), ignore_index=-100)
    return torch.where(inside, partial, ids + len(vocabulary) - vocabulary.full_size)
