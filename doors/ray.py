"""Ray Data: counting where the blocks lie."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import leanvocab as lv
from doors import models
from doors.registry import Outcome, door
from leanvocab.vocabulary.ray_data import count_block

_NEEDS: dict[str, Any] = {"needs": ("ray",), "pip": "'leanvocab[ray]'", "fast": False}


@contextmanager
def _cluster() -> Iterator[Any]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield ray
    finally:
        ray.shutdown()


def _compared(change: Any = None) -> Outcome:
    import pyarrow as pa

    rows = pa.table({"input_ids": models.token_rows(512).tolist()})
    with _cluster() as ray:
        data = ray.data.from_arrow([rows.slice(at, 64) for at in range(0, 512, 64)])
        found = lv.count_tokens(change(data) if change else data, full_size=models.FULL_SIZE)
    same = found == lv.count_tokens(rows, full_size=models.FULL_SIZE)
    return Outcome("identical" if same else "different", "", 0.0 if same else float("inf"))


@door("count_tokens of a Ray Data data set on two local workers, beside the same rows counted here", **_NEEDS)
def counts(folder: Path) -> Outcome:
    return _compared()


@door("count_tokens of a Ray Data data set, a worker of which is killed while it counts", **_NEEDS)
def killed(folder: Path) -> Outcome:
    last = models.token_rows(512)[-1].tolist()

    def die_once(batch: Any) -> Any:
        import ray

        # not the task before it, which runs a block to know the columns
        counts = count_block.__name__ in str(ray.get_runtime_context().get_task_name())
        if counts and batch["input_ids"][-1].as_py() == last and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return batch

    outcome = _compared(lambda data: data.map_batches(die_once, batch_format="pyarrow"))
    assert (folder / "died").exists()
    return outcome
