"""Weights with the kept rows alone, streamed: what loading all, selecting and saving gives; in the form of the base."""

import json
import math
from pathlib import Path

import pytest
import torch
from disk import read_all, tiny_folders, write_file
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from leanvocab.checkpoints.delta_format import Description
from leanvocab.checkpoints.merge import merge_checkpoint
from leanvocab.checkpoints.merge_plan import Changes, make_plan, read_changes
from leanvocab.errors import CheckpointError
from leanvocab.files.headers import read_header, read_weights
from leanvocab.progress import ProgressBar
from leanvocab.trimming import trimmed_files
from leanvocab.trimming.id_fields import NewIds
from leanvocab.trimming.trimmed_files import KeptRows, WrittenWeights, make_trimmed_plan, write_trimmed
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

NOTHING = Changes({}, Description("", None, {}, {}, {}))
TINY = {"table.weight": (0,), "per_layer.weight": (0,)}


def rows(vocabulary: PartialVocabulary, num_padding: int = 0, padding_id: int = 0) -> KeptRows:
    return KeptRows(NewIds(vocabulary, vocabulary.full_size, num_padding), padding_id)


def naive(
    tensors: dict[str, Tensor], dims: dict[str, tuple[int, ...]], ids: list[int], padding: list[int], full_size: int
) -> dict[str, Tensor]:
    """The specification: everything in memory, each dimension of the vocabulary selected."""
    trimmed = dict(tensors)
    for name, of_vocabulary in dims.items():
        for dim in of_vocabulary:
            size = tensors[name].shape[dim]
            wanted = ids + padding if size == full_size else [token_id for token_id in ids if token_id < size]
            trimmed[name] = trimmed[name].index_select(dim, torch.tensor(wanted, dtype=torch.int64))
    return trimmed


def trim(
    base: Path, output: Path, dims: dict[str, tuple[int, ...]], kept: KeptRows, changes: Changes = NOTHING
) -> WrittenWeights:
    plan = make_trimmed_plan(make_plan(read_weights(base), changes), changes, dims, kept)
    output.mkdir()
    written = write_trimmed(output, plan, ProgressBar("trimming", plan.num_bytes, False))
    names = [*(file.name for file in plan.files), *(["model.safetensors.index.json"] if plan.index else [])]
    assert sorted(path.name for path in output.iterdir()) == sorted(names)
    files = [file for file in names if file.endswith(".safetensors")]
    assert plan.num_bytes == sum((output / file).stat().st_size for file in files)
    return written


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8)), name


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    bits = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=torch.Generator().manual_seed(seed))
    return bits.to(torch.uint8).view(dtype).reshape(shape)  # any bits, NaN among them


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.float8_e4m3fn]


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_what_is_streamed_is_what_loading_and_selecting_gives(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("streamed")
    full_size = data.draw(st.integers(1, 40))
    ids = sorted(data.draw(st.sets(st.integers(0, full_size - 1), min_size=1)))
    padding = [ids[-1]] * data.draw(st.integers(0, 9))
    tensors, dims = {}, {}
    for number in range(data.draw(st.integers(1, 5))):
        rank = data.draw(st.integers(1, 4))
        of_vocabulary = tuple(data.draw(st.sets(st.integers(0, rank - 1))))
        sizes = st.sampled_from([full_size, *range(1, full_size)])
        shape = [data.draw(st.integers(0, 4)) for _ in range(rank)]
        for dim in of_vocabulary:
            shape[dim] = data.draw(sizes)
        tensors[f"t{number}"] = random_tensor(tuple(shape), data.draw(st.sampled_from(DTYPES)), number)
        dims[f"t{number}"] = of_vocabulary
    (folder / "base").mkdir()
    save_file(tensors, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    block = trimmed_files.BLOCK_BYTES
    trimmed_files.BLOCK_BYTES = data.draw(st.sampled_from([2, 64, block]))  # several blocks, of a row each, or one
    try:
        trim(
            folder / "base",
            folder / "out",
            dims,
            rows(PartialVocabulary(ids, full_size), len(padding), ids[-1]),
        )
    finally:
        trimmed_files.BLOCK_BYTES = block
    assert_same(read_all(folder / "out"), naive(tensors, dims, ids, padding, full_size))


@pytest.mark.parametrize("base", ["single", "sharded"])
def test_the_form_is_that_of_the_base(tmp_path: Path, base: str) -> None:
    tiny_folders(tmp_path)
    trim(tmp_path / base, tmp_path / "out", TINY, rows(PartialVocabulary([0, 5, 7, 39], 40)))
    expected = naive(read_all(tmp_path / base), TINY, [0, 5, 7, 39], [], 40)
    assert_same(read_all(tmp_path / "out"), expected)
    for path in (tmp_path / base).glob("*.safetensors"):
        old, new = read_header(tmp_path / base, path.name), read_header(tmp_path / "out", path.name)
        assert (list(old.tensors), old.metadata) == (list(new.tensors), new.metadata)
        assert path.stat().st_mode == (tmp_path / "out" / path.name).stat().st_mode
    if base == "sharded":
        old_index, new_index = (
            json.loads((tmp_path / name / "model.safetensors.index.json").read_text()) for name in (base, "out")
        )
        assert new_index["weight_map"] == old_index["weight_map"]
        assert new_index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())


def test_a_shard_without_a_vocabulary_is_the_same_file(tmp_path: Path) -> None:
    tiny_folders(tmp_path)
    trim(tmp_path / "sharded", tmp_path / "out", {"table.weight": (0,)}, rows(PartialVocabulary([3], 40)))
    shard = "model-00002-of-00002.safetensors"
    assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "sharded" / shard).read_bytes()


@pytest.mark.parametrize("base", ["single", "sharded"])
def test_a_deltas_rows_and_tensors_take_the_place_of_the_bases(tmp_path: Path, base: str) -> None:
    tiny_folders(tmp_path)
    merge_checkpoint(base=tmp_path / base, delta=tmp_path / "delta", output=tmp_path / "merged")
    changes = read_changes(tmp_path / "delta", None, read_weights(tmp_path / base))
    kept = rows(PartialVocabulary([0, 2, 5, 6, 39], 40), 3, 5)
    trim(tmp_path / base, tmp_path / "of_delta", TINY, kept, changes)
    trim(tmp_path / "merged", tmp_path / "of_merged", TINY, kept)
    assert_same(read_all(tmp_path / "of_delta"), read_all(tmp_path / "of_merged"))


def test_another_base_than_the_deltas_is_refused_by_its_digests(tmp_path: Path) -> None:
    tiny_folders(tmp_path)
    path = tmp_path / "single" / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["table.weight"][20] += 1  # a row that is not even kept
    save_file(tensors, path, metadata={"format": "pt"})
    changes = read_changes(tmp_path / "delta", None, read_weights(tmp_path / "single"))
    with pytest.raises(CheckpointError, match=r"tensor 'table.weight': expected sha256 .* not the one that the delta"):
        trim(tmp_path / "single", tmp_path / "out", TINY, rows(PartialVocabulary([0], 40)), changes)


def test_digests_are_those_of_the_bytes(tmp_path: Path) -> None:
    from leanvocab.files.tensor_files import sha256_of_tensor

    tiny_folders(tmp_path)
    written = trim(tmp_path / "single", tmp_path / "out", TINY, rows(PartialVocabulary([0, 39], 40)))
    assert written.base == {name: sha256_of_tensor(t) for name, t in read_all(tmp_path / "single").items()}
    assert written.cut == {name: sha256_of_tensor(t) for name, t in read_all(tmp_path / "out").items() if name in TINY}


@pytest.mark.parametrize(
    ("dims", "error"),
    [
        ({"nothing": (0,)}, r"expected the tensor 'nothing', which holds rows of the vocabulary, found none"),
        ({"table.weight": (2,)}, r"tensor 'table.weight': expected dimension 2 of at most 30, the vocabulary's rows"),
        ({"table.weight": (0,)}, r"expected dimension 0 of at most 30, the vocabulary's rows, found F32 \[40, 6\]"),
        (
            {"packed": (0,)},
            r"tensor 'packed': expected values of whole bytes, found F4, packed; trim before quantizing",
        ),
    ],
)
def test_dimensions_that_do_not_fit_are_refused(tmp_path: Path, dims: dict[str, tuple[int, ...]], error: str) -> None:
    tensors = {"table.weight": ("F32", [40, 6], bytes(960)), "packed": ("F4", [30, 2], bytes(30))}
    write_file(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=error):
        trim(tmp_path, tmp_path / "out", dims, rows(PartialVocabulary([0], 30)))


def test_tensors_stay_aligned_where_the_base_has_them_in_another_order(tmp_path: Path) -> None:
    tensors = {"half": ("F16", [3], bytes(6)), "table": ("F16", [5], bytes(10)), "full": ("F32", [2], bytes(8))}
    write_file(tmp_path / "model.safetensors", tensors)
    trim(tmp_path, tmp_path / "out", {"table": (0,)}, rows(PartialVocabulary([1, 2], 5)))
    assert [tuple(t.shape) for t in read_all(tmp_path / "out").values()] == [(2,), (3,), (2,)]


@pytest.mark.parametrize("header_length", [0, 8, 24, 56, 3])
@pytest.mark.parametrize("first", ["table", "bias", "rest"])
def test_what_is_not_cut_stays_where_it_was_on_a_line_of_the_cache(
    tmp_path: Path, header_length: int, first: str
) -> None:
    shapes = {"table": [50, 16], "bias": [50], "rest": [30, 16], "more": [16]}
    names = sorted(shapes, key=lambda name: name != first)
    write_file(
        tmp_path / "model.safetensors",
        {name: ("F32", shapes[name], bytes(4 * math.prod(shapes[name]))) for name in names},
        {"long": "x" * header_length},
    )
    trim(tmp_path, tmp_path / "out", {"table": (0,), "bias": (0,)}, rows(PartialVocabulary([1, 2, 7], 50)))
    old, new = (read_header(folder, "model.safetensors") for folder in (tmp_path, tmp_path / "out"))
    if old.tensors["rest"].start % 4 == 0:  # in a file of torch's it is always so
        assert old.tensors["rest"].start % 64 == new.tensors["rest"].start % 64
    assert len({entry.start % 4 for entry in new.tensors.values()}) == 1
    assert_same(
        read_all(tmp_path / "out"),
        naive(read_all(tmp_path), {"table": (0,), "bias": (0,)}, [1, 2, 7], [], 50),
    )


def test_a_base_that_is_cut_off_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    tiny_folders(tmp_path)
    path = tmp_path / "single" / "model.safetensors"
    plan = make_trimmed_plan(
        make_plan(read_weights(tmp_path / "single"), NOTHING), NOTHING, TINY, rows(PartialVocabulary([39], 40))
    )
    path.write_bytes(path.read_bytes()[:-400])
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="was cut off while it was read"):
        write_trimmed(tmp_path / "out", plan, ProgressBar("", plan.num_bytes, False))


def peak_of_trimming(folder: str, num_rows: int, dim: int) -> tuple[int, int]:
    """(bytes of the table, growth of this process's anonymous bytes while a model with a table of so many rows is trimmed)."""
    from leanvocab.files.headers import make_header
    from leanvocab.reports.peak import record_peak

    base = Path(folder) / "base"
    base.mkdir()
    forms = [("table", "BF16", (num_rows, dim)), ("bias", "F32", (1, num_rows)), ("rest", "F32", (1000, 1000))]
    header, _ = make_header(None, forms)
    with (base / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + num_rows * dim * 2 + num_rows * 4 + 4_000_000)
    kept = rows(PartialVocabulary(range(0, num_rows, 2), num_rows), 10, 4)
    with record_peak() as peak:
        trim(base, Path(folder) / "out", {"table": (0,), "bias": (1,)}, kept)
    return num_rows * dim * 2, peak.anonymous_growth_bytes


@pytest.mark.parametrize("rows", [100_000, pytest.param(500_000, marks=pytest.mark.slow)])
def test_memory_is_a_few_blocks_whatever_the_size_of_the_table(tmp_path: Path, rows: int) -> None:
    from own_process import in_own_process

    num_bytes, grown = in_own_process(peak_of_trimming, str(tmp_path), rows, 1024)
    print(f"a table of {num_bytes / 1e6:,.0f} MB, of which half is kept: {grown / 1e6:,.0f} MB more memory")
    assert grown < 100e6
