"""A naive trimming on disk: every tensor is loaded, sliced and saved again."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from leanvocab.files.headers import read_weights
from leanvocab.trimming.model_files import ModelFiles
from leanvocab.trimming.vocabulary_tensors import TrimmedTensor
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary


def trim(folder: Path, output: Path, ids: Iterable[int]) -> tuple[PartialVocabulary, dict[str, TrimmedTensor]]:
    """Writes `output` with these ids and those that the model needs; the kept ids, and the tensors that changed."""
    files = ModelFiles.read(folder)
    wanted = {token_id for token_id in ids if token_id < files.full_size} | set(files.required_ids().tolist())
    vocabulary = PartialVocabulary(sorted(wanted), files.full_size)
    new_ids = files.new_ids(vocabulary)
    changed = files.trimmed_tensors(read_weights(folder).shapes, new_ids)
    written = files.written(new_ids)
    output.mkdir()
    for name, content in written.items():
        (output / name).write_bytes(content)
    tensors = {name: tensor for file in read_weights(folder).files for name, tensor in load_file(file.path).items()}
    for name, change in changed.items():
        for dim in change.dims:
            tensors[name] = kept_of(tensors[name], dim, vocabulary)
        assert tuple(tensors[name].shape) == change.shape
    save_file({name: its.contiguous() for name, its in tensors.items()}, output / "model.safetensors", {"format": "pt"})
    return vocabulary, changed


def kept_of(tensor: Tensor, dim: int, vocabulary: PartialVocabulary) -> Tensor:
    """The kept ids' part of a dimension of a tensor."""
    ids = vocabulary.token_ids[vocabulary.token_ids < tensor.shape[dim]]
    return tensor.index_select(dim, torch.from_numpy(ids.copy()))


def new_ids_of(ids: Tensor, vocabulary: PartialVocabulary) -> Tensor:
    """Ids by their new numbers; -100 stays, and what lies beyond all ids does so still."""
    inside = ids < vocabulary.full_size
    partial: Tensor = vocabulary.to_partial(torch.where(inside, ids, -100), ignore_index=-100)
    return torch.where(inside, partial, ids + len(vocabulary) - vocabulary.full_size)
