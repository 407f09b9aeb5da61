"""A Ray Data data set is counted in Ray's workers, on a local cluster, and the counts are those of the same rows here."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from leanvocab.errors import DataError
from leanvocab.vocabulary.counts import count_tokens
from leanvocab.vocabulary.ray_data import add_partial_counts, count_block

pytestmark = pytest.mark.filterwarnings("ignore")  # what Ray's own threads and files warn of


def table(num_rows: int = 400) -> pa.Table:
    chance = np.random.default_rng(0)
    ids = [chance.integers(0, 900, size=int(size)).tolist() for size in chance.integers(0, 40, size=num_rows)]
    labels = [[-100, *row[1:]] for row in ids]
    return pa.table({"input_ids": ids, "labels": labels, "text": ["a text"] * num_rows})


def counted(block: pa.Table, full_size: int | None = None) -> Any:
    return count_block(block, None, full_size)


def test_partial_counts_of_blocks_add_up_to_the_counts_of_the_table() -> None:
    blocks = [counted(table().slice(at, 90)) for at in range(0, 450, 90)]  # the last one is empty
    row = add_partial_counts(pa.concat_tables(blocks)).to_pylist()[0]
    expected = count_tokens(table())
    assert row["token_ids"] == expected.token_ids.tolist()
    assert row["counts"] == expected.counts[expected.token_ids].tolist()
    assert row["columns"] == list(expected.columns)


def test_what_a_worker_refuses_comes_back_as_a_row() -> None:
    assert "expected ids below full_size=10" in counted(table(), full_size=10).to_pylist()[0]["error"]


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster of two workers on this machine."""
    module = pytest.importorskip("ray")
    os.environ |= {"RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    module.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    module.data.DataContext.get_current().enable_progress_bars = False
    yield module
    module.shutdown()


def test_the_counts_of_a_ray_data_set_are_those_counted_here(ray: Any, tmp_path: Path) -> None:
    for number in range(4):
        pyarrow.parquet.write_table(table().slice(number * 100, 100), tmp_path / f"{number}.parquet")
    found = count_tokens(ray.data.read_parquet(str(tmp_path)), full_size=1000)
    expected = count_tokens(table(), full_size=1000)
    assert found == expected
    assert found.columns == expected.columns == ("input_ids", "labels")


def test_many_blocks_are_added_up_and_a_named_column_alone_is_counted(ray: Any) -> None:
    data = ray.data.from_arrow([table().slice(at, 10) for at in range(0, 400, 10)])
    assert count_tokens(data, "input_ids", num_workers=2) == count_tokens(table(), "input_ids")


def test_an_id_outside_and_a_column_that_is_absent_are_errors_as_ever(ray: Any) -> None:
    data = ray.data.from_arrow(table())
    with pytest.raises(DataError, match=r"expected ids below full_size=100.*numbered in a block"):
        count_tokens(data, full_size=100)
    with pytest.raises(DataError, match="text"):
        count_tokens(data, "text")
    with pytest.raises(DataError, match="absent"):
        count_tokens(data, "absent")


def test_a_worker_that_is_killed_while_it_counts_changes_nothing(ray: Any, tmp_path: Path) -> None:
    flag, last = tmp_path / "died", table()["input_ids"][-1].as_py()

    def die_once(batch: pa.Table) -> pa.Table:
        import ray  # the fixture's module does not travel

        # not the task before it, which runs a block to know the columns
        counts = count_block.__name__ in str(ray.get_runtime_context().get_task_name())
        if counts and batch["input_ids"][-1].as_py() == last and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return batch

    data = ray.data.from_arrow([table().slice(at, 100) for at in range(0, 400, 100)])
    found = count_tokens(data.map_batches(die_once, batch_format="pyarrow"))
    assert flag.exists()
    assert found == count_tokens(table())
