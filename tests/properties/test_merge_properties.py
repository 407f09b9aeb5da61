"""Merging after shrinking is the identity, for any vocabularies, dtypes, shardings and ties; checked against ten naive lines."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from comparing import bits
from disk import content, random_rows, read_all
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from leanvocab.checkpoints.delta_saving import save_delta
from leanvocab.checkpoints.merge import merge_checkpoint
from leanvocab.files.headers import read_header
from leanvocab.files.row_bytes import convert, gaps, runs
from leanvocab.model.shrink import shrink_
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class Model(nn.Module):
    """One or two tables, a second module that may share the first, and a head."""

    def __init__(self, rows: int, dims: list[int], dtype: torch.dtype, tied: bool):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, dim, dtype=dtype) for dim in dims)
        self.again = nn.Embedding(rows, dims[0], dtype=dtype)
        if tied:
            self.again.weight = self.tables[0].weight
        self.head = nn.Linear(dims[0], 3, dtype=dtype)
        self.register_buffer("steps", torch.tensor(7))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Model, dict[str, PartialVocabulary], list[list[str]], bool]:
    """(a model, vocabularies by table, the tensors of each shard, whether all tensors are asked for)."""
    rows = draw(st.integers(1, 24))
    dims = draw(st.lists(st.integers(1, 9), min_size=1, max_size=2))
    model = Model(rows, dims, draw(st.sampled_from(list(DTYPES.values()))), draw(st.booleans()))
    ids = st.sets(st.integers(0, rows - 1), min_size=1).map(sorted)
    vocabularies = {f"tables.{i}": PartialVocabulary(draw(ids), rows) for i in range(len(dims))}
    names = list(tensors_of(model))
    places = draw(st.lists(st.integers(0, 2), min_size=len(names), max_size=len(names)))
    shards = [[name for name, place in zip(names, places, strict=True) if place == shard] for shard in range(3)]
    return model, vocabularies, [shard for shard in shards if shard], draw(st.booleans())


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor once: of tied ones the first."""
    seen: set[int] = set()
    found = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found


def write_base(folder: Path, tensors: dict[str, Tensor], shards: list[list[str]]) -> None:
    folder.mkdir()
    if len(shards) == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "note": "ä"})
        return
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@settings(max_examples=30, deadline=None)
@given(cases(), st.integers(0, 2**31))
def test_merging_after_shrinking_is_what_training_the_full_tables_gives(case: tuple, seed: int) -> None:
    model, vocabularies, shards, all_tensors = case
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        tensors = {name: value.clone() for name, value in tensors_of(model).items()}
        write_base(folder / "base", tensors, shards)
        shrink_(model, vocabularies)
        expected = {name: value.clone() for name, value in tensors.items()}
        for path, vocabulary in vocabularies.items():  # the naive merge: rows of a full matrix are replaced
            rows = random_rows(
                len(vocabulary), model.get_submodule(path).embedding_dim, expected[f"{path}.weight"].dtype, seed
            )
            model.get_submodule(path).weight.data.copy_(rows)
            for token_id, row in zip(vocabulary, rows, strict=True):
                expected[f"{path}.weight"][token_id] = row
        if seed % 2:
            model.head.bias.data.add_(1)
            expected["head.bias"] += 1
        save_delta(model, folder / "delta", base=folder / "base", tensors="all" if all_tensors else "changed")
        merge_checkpoint(base=folder / "base", delta=folder / "delta", output=folder / "out", verify=True)
        merged = read_all(folder / "out")
        assert set(merged) == set(expected)
        assert all(bits(merged[name].view(-1)) == bits(expected[name].view(-1)) for name in expected)
        assert_form_is_kept(folder / "base", folder / "out")
        before = content(folder / "out")
        assert merge_checkpoint(base=folder / "base", delta=folder / "delta", output=folder / "out").already_there
        merge_checkpoint(base=folder / "base", delta=folder / "delta", in_place=True, verify=True)
        assert content(folder / "base") == content(folder / "out") == before


def assert_form_is_kept(base: Path, out: Path) -> None:
    """The same files, with the same headers byte for byte: sharding, order, dtypes and metadata."""
    assert sorted(path.name for path in base.iterdir()) == sorted(path.name for path in out.iterdir())
    for path in base.iterdir():
        if path.suffix == ".safetensors":
            assert read_header(base, path.name).raw == read_header(out, path.name).raw
        else:
            assert path.read_bytes() == (out / path.name).read_bytes()


@given(st.sets(st.integers(0, 60)).map(sorted))
def test_runs_and_gaps_take_each_row_once(ids: list[int]) -> None:
    token_ids = np.array(ids, dtype=np.int64)
    assert [first + i for _, first, count in runs(token_ids) for i in range(count)] == ids
    assert [place + i for place, _, count in runs(token_ids) for i in range(count)] == list(range(len(ids)))
    outside = [first + i for first, count in gaps(token_ids, 61) for i in range(count)]
    assert sorted(ids + outside) == list(range(61))


@given(st.binary(min_size=8, max_size=400), st.sampled_from(list(DTYPES)), st.sampled_from(list(DTYPES)))
def test_dtypes_are_converted_as_torch_converts_them(data: bytes, source: str, target: str) -> None:
    data = data[: len(data) // 8 * 8]
    values = torch.frombuffer(bytearray(data), dtype=DTYPES[source])
    expected, found = (
        values.to(DTYPES[target]),
        torch.frombuffer(bytearray(convert(data, source, target)), dtype=DTYPES[target]),
    )
    is_nan = expected.isnan()
    assert torch.equal(found.isnan(), is_nan)
    if source == "F64" and target == "BF16":  # by way of fp32, as torch does it too
        expected = values.float().to(torch.bfloat16)
    assert bits(found[~is_nan]) == bits(expected[~is_nan])
