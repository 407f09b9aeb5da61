"""One fine-tuning in a fresh process, and what that process held in memory meanwhile."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SAMPLING_SECONDS = 0.05
# Threads that wait sleep instead of spinning: on a machine that is also busy with something else, spinning took three
# times as long.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class Run:
    """The result that `leanvocab finetune --json` printed, and memory of its process.

    `anonymous` holds (seconds since the start, bytes that the process itself allocated); file pages, which the kernel
    can drop at any time, are in the peak of resident bytes only.
    """

    output_dir: Path
    result: dict[str, Any]
    peak_rss_bytes: int
    anonymous: list[tuple[float, int]]

    @property
    def peak_anonymous_bytes(self) -> int:
        return max(held for _, held in self.anonymous)

    @property
    def losses(self) -> list[float]:
        return [loss for _, loss in self.result["losses"]]


def finetune(model: Path, data: Path, output_dir: Path, options: list[str]) -> Run:
    """`leanvocab finetune` in a fresh process; its progress bars go to this terminal, and nothing of it elsewhere."""
    command = [sys.executable, "-m", "leanvocab", "finetune", str(model), str(data), "-o", str(output_dir), "--json"]
    if not sys.stderr.isatty():
        command.append("--quiet")  # each step is logged, to be compared: hundreds of lines
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, env=_ENVIRONMENT | os.environ)
    samples: list[tuple[float, int]] = []
    sampler = threading.Thread(target=_sample, args=(process.pid, samples), daemon=True)
    sampler.start()
    assert process.stdout is not None
    with process.stdout as pipe:
        printed = pipe.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    sampler.join()
    if process.returncode != 0:
        raise SystemExit(f"leanvocab finetune ended with {process.returncode}: {printed}")
    return Run(output_dir, json.loads(printed), usage.ru_maxrss * 1024, samples or [(0.0, 0)])


def _sample(pid: int, samples: list[tuple[float, int]]) -> None:
    start = time.perf_counter()
    while (held := _anonymous_bytes(pid)) is not None:
        samples.append((time.perf_counter() - start, held))
        time.sleep(_SAMPLING_SECONDS)


def _anonymous_bytes(pid: int) -> int | None:
    """None when the process has ended, or on a system without /proc."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(found[0].split()[1]) * 1024 if found else None
