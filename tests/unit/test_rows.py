import errno
import os
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from leanvocab.errors import CheckpointError
from leanvocab.files import row_store
from leanvocab.files.row_store import RowStore, RowWriter, put_rows, same_bits, take_rows, zero_pages

MATRIX = torch.arange(24, dtype=torch.float32).view(6, 4)
KEPT = torch.tensor([0, 3, 5])


@pytest.fixture
def mapped(tmp_path: Path) -> torch.Tensor:
    """A matrix of some pages that maps a file, as `from_pretrained` leaves it."""
    matrix = torch.randn(3000, 48, generator=torch.Generator().manual_seed(0))
    save_file({"before": torch.zeros(7), "matrix": matrix}, tmp_path / "model.safetensors")
    return load_file(tmp_path / "model.safetensors")["matrix"]


def test_take_rows_gives_the_chosen_rows_in_their_order() -> None:
    assert take_rows(MATRIX, torch.tensor([5, 0])).tolist() == [[20, 21, 22, 23], [0, 1, 2, 3]]


def test_put_rows_writes_the_chosen_rows_and_no_other() -> None:
    full = MATRIX.clone()
    put_rows(full, KEPT, torch.full((3, 4), -1.0))
    assert full[KEPT].eq(-1).all()
    assert same_bits(full[[1, 2, 4]], MATRIX[[1, 2, 4]])


def test_the_store_of_a_mapped_tensor_is_the_file_itself(mapped: torch.Tensor) -> None:
    store = RowStore.of(mapped, KEPT)
    assert not store.temporary
    assert store.path.endswith("model.safetensors")
    assert same_bits(store.private_view(), mapped)


def test_the_store_of_a_mapped_tensor_outlives_its_path(mapped: torch.Tensor, tmp_path: Path) -> None:
    expected = mapped.clone()
    store = RowStore.of(mapped, KEPT)
    save_file({"matrix": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    os.replace(tmp_path / "other.safetensors", tmp_path / "model.safetensors")
    assert same_bits(store.private_view(), expected)


def test_a_file_that_was_replaced_before_the_store_was_made_is_not_mistaken_for_the_mapped_one(
    mapped: torch.Tensor, tmp_path: Path
) -> None:
    save_file({"before": torch.zeros(7), "matrix": torch.zeros(3000, 48)}, tmp_path / "other.safetensors")
    os.replace(tmp_path / "other.safetensors", tmp_path / "model.safetensors")
    store = RowStore.of(mapped, KEPT)
    assert store.temporary
    assert same_bits(store.private_view(), mapped)


def test_rows_that_were_written_to_after_mapping_are_not_read_from_the_file(mapped: torch.Tensor) -> None:
    mapped[1500] = 7.0
    store = RowStore.of(mapped, KEPT)
    assert store.temporary
    assert same_bits(store.private_view(), mapped)


def test_writing_to_kept_rows_alone_leaves_the_file_as_the_store(tmp_path: Path) -> None:
    matrix = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0))  # two pages a row
    save_file({"matrix": matrix}, tmp_path / "model.safetensors")
    mapped = load_file(tmp_path / "model.safetensors")["matrix"]
    mapped[30, 1000:1010] = 7.0
    assert not RowStore.of(mapped, torch.tensor([29, 30, 31])).temporary
    assert RowStore.of(mapped, torch.tensor([3])).temporary


def test_writing_to_a_private_view_changes_neither_the_file_nor_another_view(
    mapped: torch.Tensor, tmp_path: Path
) -> None:
    before = (tmp_path / "model.safetensors").read_bytes()
    store = RowStore.of(mapped, KEPT)
    put_rows(store.private_view(), KEPT, torch.zeros(3, 48))
    assert same_bits(store.private_view(), mapped)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_temporary_store_leaves_no_file_behind(tmp_path: Path) -> None:
    store = RowStore.of(torch.randn(10, 4), KEPT, str(tmp_path))
    assert store.temporary
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_store_keeps_every_bit_of_every_dtype(dtype: torch.dtype) -> None:
    matrix = torch.randn(10, 4).to(dtype)
    matrix[1, 1], matrix[2, 2] = float("nan"), -0.0
    assert same_bits(RowStore.of(matrix, KEPT).private_view(), matrix)


def test_rows_written_in_any_order_are_found_and_the_others_are_zero() -> None:
    writer = RowWriter((6, 4), torch.float32, None)
    writer.put(4, MATRIX[4:])
    writer.put(0, MATRIX[:1])
    expected = MATRIX.clone()
    expected[1:4] = 0
    assert same_bits(writer.finish().private_view(), expected)


def test_a_full_disk_is_an_error_that_names_the_folder_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=rf"no room in {tmp_path} .* \(10 × 4\).* store_dir=") as raised:
        RowStore.of(torch.randn(10, 4), KEPT, str(tmp_path))
    assert raised.value.errno == errno.ENOSPC


def test_pickling_refers_to_a_checkpoint_and_carries_temporary_rows(mapped: torch.Tensor) -> None:
    reference = pickle.dumps(RowStore.of(mapped, KEPT))
    assert len(reference) < 2000
    assert same_bits(pickle.loads(reference).private_view(), mapped)
    carried = pickle.dumps(RowStore.of(mapped.clone(), KEPT))
    assert len(carried) > mapped.nbytes
    assert same_bits(pickle.loads(carried).private_view(), mapped)


def test_a_pickle_whose_checkpoint_has_gone_or_changed_is_refused(mapped: torch.Tensor, tmp_path: Path) -> None:
    reference = pickle.dumps(RowStore.of(mapped, KEPT))
    save_file({"before": torch.zeros(7), "matrix": torch.zeros(3000, 48)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds other rows now; put the base checkpoint back"):
        pickle.loads(reference)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="shorter than expected"):
        pickle.loads(reference)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be opened"):
        pickle.loads(reference)


def test_differs_sees_one_bit_outside_the_kept_rows_and_none_inside() -> None:
    store = RowStore.of(MATRIX, KEPT)
    other = MATRIX.clone()
    other[3] = 100
    assert not store.differs(other, KEPT)
    other[4, 2] = torch.nextafter(other[4, 2], torch.tensor(torch.inf))
    assert store.differs(other, KEPT)


def test_zero_pages_are_zeros_of_the_shape_and_dtype() -> None:
    zeros = zero_pages((3, 5), torch.bfloat16)
    assert zeros.shape == (3, 5)
    assert zeros.dtype == torch.bfloat16
    assert not zeros.any()
    assert zero_pages((0, 5), torch.float32).shape == (0, 5)


def test_a_temporary_folder_in_memory_is_avoided_where_there_is_one_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {tempfile.gettempdir(): "tmpfs", "/var/tmp": "ext4"}
    monkeypatch.setattr(row_store, "file_system", kinds.get)
    assert row_store.folder_on_disk() == "/var/tmp"
    kinds["/var/tmp"] = "tmpfs"
    assert row_store.folder_on_disk() is None
    kinds[tempfile.gettempdir()] = "ext4"
    assert row_store.folder_on_disk() is None


def test_the_file_system_of_a_folder_is_the_one_mounted_nearest_above_it() -> None:
    assert row_store.file_system("/proc/self") in ("proc", None)
    assert row_store.file_system("/nowhere/at/all") is None
