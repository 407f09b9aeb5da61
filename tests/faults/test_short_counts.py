"""A system that moves fewer bytes than it is asked to, or none, and interrupts: all is read and written, or it is an error."""

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import differing, train
from disk import content, random_rows, read_all, tiny_folders, tiny_module, trained_pair
from models import batch

import leanvocab as lv
from leanvocab.checkpoints.delta_format import read_delta
from leanvocab.checkpoints.merge_plan import make_plan, read_changes
from leanvocab.checkpoints.optimizer_states import read_full_states
from leanvocab.errors import CheckpointError
from leanvocab.files.copying import copy_range, read_exactly, sha256_of_range, write_at
from leanvocab.files.headers import read_header, read_weights
from leanvocab.files.row_store import RowStore, RowWriter
from leanvocab.files.tensor_files import read_tensor
from leanvocab.files.untrusted_files import read_json
from leanvocab.progress import ProgressBar
from leanvocab.trimming.id_fields import NewIds
from leanvocab.trimming.trimmed_files import KeptRows, make_trimmed_plan, write_trimmed
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

SOURCE = Path(lv.__file__).parent
MOST = [1, 7, 100]
DATA = bytes(range(256)) * 40
pytestmark = pytest.mark.timeout(120)  # a loop that makes no progress ends here


@contextlib.contextmanager
def short_counts(most: int, *, seed: int = 0, kernel_copies: bool = True) -> Iterator[Counter[str]]:
    """A system that moves at most `most` bytes a call, a random number of them, and is interrupted all the time; counts calls.

    With `most=0` nothing is ever moved. Without `kernel_copies` no descriptor is copied to another without a buffer.
    """
    number, calls, patched = random.Random(seed), Counter[str](), pytest.MonkeyPatch()

    def some(wanted: int) -> int:
        return min(wanted, number.randint(1, most)) if most else 0

    def shortened(name: str, call: Any) -> Any:
        def short(*arguments: Any) -> Any:
            calls[name] += 1
            return call(*arguments)

        return short

    pread, preadv, pwrite, copy = os.pread, os.preadv, os.pwrite, os.copy_file_range
    read, write, sendfile = os.read, os.write, os.sendfile
    short = {
        "pread": lambda source, size, start: pread(source, some(size), start),
        "preadv": lambda source, buffers, start: preadv(
            source, [memoryview(buffers[0])[: some(len(buffers[0]))]], start
        ),
        "pwrite": lambda target, data, start: pwrite(target, memoryview(data)[: some(len(data))], start),
        "copy_file_range": lambda source, target, size, start, to: copy(source, target, some(size), start, to),
        "read": lambda source, size: read(source, some(size)),
        "write": lambda target, data: write(target, memoryview(data)[: some(len(data))]),
        "sendfile": lambda target, source, start, size: sendfile(target, source, start, some(size)),
    }
    for name, call in short.items():
        patched.setattr(os, name, shortened(name, call))
    if not kernel_copies:
        patched.delattr(os, "copy_file_range")
    before = signal.signal(signal.SIGVTALRM, lambda *_: calls.update(["signal"]))
    signal.setitimer(signal.ITIMER_VIRTUAL, 1e-3, 1e-3)
    try:
        yield calls
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        patched.undo()


def files(folder: Path) -> tuple[int, int]:
    (folder / "source").write_bytes(DATA)
    return os.open(folder / "source", os.O_RDONLY), os.open(folder / "target", os.O_RDWR | os.O_CREAT)


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", MOST)
@pytest.mark.parametrize("kernel_copies", [True, False])
def test_all_bytes_are_read_written_copied_and_digested(tmp_path: Path, most: int, kernel_copies: bool) -> None:
    source, target = files(tmp_path)
    with short_counts(most, kernel_copies=kernel_copies) as calls:
        assert read_exactly(source, 3, 5000) == DATA[3:5003]
        write_at(target, DATA[:6000], 0)
        copied: list[int] = []
        copy_range(source, 6000, target, 6000, len(DATA) - 6000, copied.append)
        assert sha256_of_range(source, 5, 9000) == hashlib.sha256(DATA[5:9000]).hexdigest()
    assert (tmp_path / "target").read_bytes() == DATA
    assert sum(copied) == len(DATA) - 6000
    assert min(calls[name] for name in ("pread", "pwrite", "preadv")) > 1
    assert (calls["copy_file_range"] > 0) == kernel_copies


def test_this_system_would_notice_code_that_calls_once(tmp_path: Path) -> None:
    source, target = files(tmp_path)
    with short_counts(7):
        assert len(os.pread(source, 100, 0)) < 100
        assert os.preadv(source, [bytearray(100)], 0) < 100
        assert os.pwrite(target, DATA, 0) < 100
        assert os.copy_file_range(source, target, 100, 0, 0) < 100


def test_no_other_module_calls_what_may_move_fewer_bytes() -> None:
    raw = re.compile(r"\bos\.(p?readv?|p?writev?|copy_file_range|sendfile|splice)\(")
    calling = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if raw.search(path.read_text())}
    assert calling == {"files/copying.py"}


def test_a_write_that_makes_no_progress_is_an_error(tmp_path: Path) -> None:
    source, target = files(tmp_path)
    with short_counts(0):
        with pytest.raises(OSError, match="the system wrote nothing of 10,240 bytes"):
            write_at(target, DATA, 0)
        with pytest.raises(CheckpointError, match="cut off while it was read"):
            read_exactly(source, 0, 10)
        with pytest.raises(CheckpointError, match="cut off while it was read"):
            sha256_of_range(source, 0, 10)
        with pytest.raises(CheckpointError, match="cut off while it was read"):
            copy_range(source, 0, target, 0, 10)


def test_a_kernel_that_copies_nothing_is_left_for_reading_and_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = files(tmp_path)
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    copy_range(source, 0, target, 0, len(DATA))
    assert (tmp_path / "target").read_bytes() == DATA
    with pytest.raises(CheckpointError, match="cut off while it was read: expected 1 more bytes"):
        copy_range(source, 0, target, 0, len(DATA) + 1)


# --- what stands on them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", MOST)
def test_headers_json_tensors_and_deltas_are_read_whole(tmp_path: Path, most: int) -> None:
    tiny_folders(tmp_path)
    index = "model.safetensors.index.json"
    with short_counts(most) as calls:
        sharded, single = read_weights(tmp_path / "sharded"), read_header(tmp_path / "single", "model.safetensors")
        raw, _ = read_json(tmp_path / "sharded", index)
        tensors = {name: read_tensor(single, name) for name in single.tensors}
        description, _ = read_delta(tmp_path / "delta")
    assert set(sharded.tensors) == set(single.tensors)
    assert raw == (tmp_path / "sharded" / index).read_bytes()
    assert differing(tensors, read_all(tmp_path / "single")) == []
    assert set(description.tables) == {"table.weight", "per_layer.weight"}
    assert calls["pread"] > 20


@pytest.mark.parametrize("most", MOST)
def test_a_temporary_store_holds_all_rows(tmp_path: Path, most: int) -> None:
    rows = random_rows(90, 30, torch.bfloat16)
    with short_counts(most):
        store = RowStore.copy(rows, str(tmp_path))
        writer = RowWriter((90, 30), torch.bfloat16, str(tmp_path))
        writer.put(40, rows[40:])
        writer.put(0, rows[:40])
    for stored in (store, writer.finish()):
        assert not stored.differs(rows, torch.tensor([], dtype=torch.long))


def test_a_temporary_store_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with short_counts(0), pytest.raises(OSError, match="the system wrote nothing") as caught:
        RowStore.copy(random_rows(9, 3, torch.float32), str(tmp_path))
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("most", MOST)
@pytest.mark.parametrize("base", ["single", "sharded"])
@pytest.mark.parametrize("kernel_copies", [True, False])
def test_a_merge_writes_and_verifies_every_byte(tmp_path: Path, most: int, base: str, kernel_copies: bool) -> None:
    expected = tiny_folders(tmp_path)
    options: dict[str, Any] = {"base": tmp_path / base, "delta": tmp_path / "delta"}
    with short_counts(most, kernel_copies=kernel_copies):
        written = lv.merge_checkpoint(**options, output=tmp_path / "out", verify=True)
        again = lv.merge_checkpoint(**options, output=tmp_path / "out")
        lv.merge_checkpoint(**options, in_place=True)
        in_place_again = lv.merge_checkpoint(**options, in_place=True)
    assert (written.already_there, again.already_there, in_place_again.already_there) == (False, True, True)
    assert differing(read_all(tmp_path / "out"), expected.state_dict()) == []
    assert content(tmp_path / base) == content(tmp_path / "out")


@pytest.mark.parametrize("most", MOST)
@pytest.mark.parametrize("kernel_copies", [True, False])
def test_trimmed_weights_are_the_same_files_as_ever(tmp_path: Path, most: int, kernel_copies: bool) -> None:
    tiny_folders(tmp_path)
    changes = read_changes(tmp_path / "delta", None, read_weights(tmp_path / "sharded"))
    kept = KeptRows(NewIds(PartialVocabulary([0, 2, 5, 39], 40), 40, 3), 2)

    def trim(folder: Path) -> None:
        merged = make_plan(read_weights(tmp_path / "sharded"), changes)
        plan = make_trimmed_plan(merged, changes, {"table.weight": (0,), "per_layer.weight": (0,)}, kept)
        folder.mkdir()
        write_trimmed(folder, plan, ProgressBar("", plan.num_bytes, False))

    trim(tmp_path / "ordinary")
    with short_counts(most, kernel_copies=kernel_copies) as calls:
        trim(tmp_path / "short")
    assert content(tmp_path / "short") == content(tmp_path / "ordinary")
    assert calls["pwrite"] > 10


@pytest.mark.parametrize("call", ["pwrite", "preadv", "pread"])
def test_a_merge_that_makes_no_progress_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    tiny_folders(tmp_path)
    before = content(tmp_path)
    nothing: Callable[..., Any] = {"pwrite": lambda *_: 0, "preadv": lambda *_: 0, "pread": lambda *_: b""}[call]
    with monkeypatch.context() as patched:
        patched.setattr(os, call, nothing)
        with pytest.raises((OSError, CheckpointError), match=r"wrote nothing|cut off|truncated"):
            lv.merge_checkpoint(base=tmp_path / "single", delta=tmp_path / "delta", output=tmp_path / "out")
    assert content(tmp_path) == before


@pytest.mark.parametrize("most", MOST)
def test_deltas_and_full_checkpoints_are_the_same_files_as_ever(tmp_path: Path, most: int) -> None:
    tiny_folders(tmp_path)
    model = lv.shrink_(tiny_module(), {"table": PartialVocabulary([1, 5], 40), "per_layer": PartialVocabulary([3], 40)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    model["head"](model["table"](torch.tensor([1, 5]))).sum().backward()
    optimizer.step()

    def write(folder: Path) -> None:
        lv.save_full(model, folder / "full")
        lv.save_delta(model, folder / "delta", base=tmp_path / "single", optimizer=optimizer)
        shutil.copy(folder / "delta" / "optimizer.json", folder / "states.json")

    write(tmp_path / "ordinary")
    for file in (tmp_path / "single").iterdir():
        os.utime(file)  # so that no digest is known
    with short_counts(most):
        write(tmp_path / "short")
        states = read_full_states(tmp_path / "short" / "delta", read_delta(tmp_path / "short" / "delta")[0])
        other = lv.shrink_(
            tiny_module(), {"table": PartialVocabulary([1, 5], 40), "per_layer": PartialVocabulary([3], 40)}
        )
        lv.load_delta(other, tmp_path / "short" / "delta", base=tmp_path / "single")
    assert content(tmp_path / "short") == content(tmp_path / "ordinary")
    assert differing(other, model) == []
    assert states["state"][0]["exp_avg"].shape == (40, 6)
    assert json.loads((tmp_path / "short" / "states.json").read_text())["class"] == "AdamW"


def test_a_model_of_transformers_is_saved_and_merged_on_such_a_system(tmp_path: Path) -> None:
    full, model = trained_pair(tmp_path)
    with short_counts(50_000):
        lv.save_full(model, tmp_path / "saved")
        lv.save_delta(model, tmp_path / "delta")
        lv.merge_checkpoint(base=tmp_path / "base", delta=tmp_path / "delta", output=tmp_path / "out", verify=True)
        train(model, steps=1, **batch())
    for name in ("saved", "out"):
        assert differing(type(full).from_pretrained(tmp_path / name), full) == []
