"""Ways of measuring: programs take turns, within a budget of time; memory in processes where nothing else was done."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class Budget:
    """Seconds that a benchmark may take; rounds go on while there are some left."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._start = time.perf_counter()

    @property
    def spent(self) -> float:
        return time.perf_counter() - self._start

    @property
    def left(self) -> float:
        return max(0.0, self.seconds - self.spent)

    def part(self, share: float) -> "Budget":
        """A budget of its own that starts now: a share of the whole, and no more than what is left."""
        return Budget(min(share * self.seconds, self.left))


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def seconds_on_disk(work: Callable[[], Any], made: Path) -> float:
    """Seconds of what writes a folder, with nothing waiting to be written before it; the folder is removed."""
    subprocess.run(["sync"], check=True)
    taken = seconds_of(work)
    shutil.rmtree(made)
    return taken


def turns(names: Iterable[str], rounds: int, budget: Budget, *, spare: int = 1) -> Iterator[str]:
    """Names in turn (A B C, C B A, …): one round at least, more while the budget lasts for `spare` of the longest."""
    order, longest = list(names), 0.0
    for turn in range(rounds):
        if turn and budget.left < spare * longest:
            break
        start = budget.spent
        yield from order if turn % 2 == 0 else order[::-1]
        longest = max(longest, budget.spent - start)


def take_turns(
    programs: Mapping[str, Callable[[], Any]],
    rounds: int,
    budget: Budget,
    measure: Callable[[Callable[[], Any]], Any] = seconds_of,
) -> dict[str, list[Any]]:
    """Seconds of each program in each round, or what `measure` gives of it."""
    taken: dict[str, list[Any]] = {name: [] for name in programs}
    for name in turns(programs, rounds, budget):
        taken[name].append(measure(programs[name]))
    return taken


def run_child(
    module: str, *arguments: Any, python: str = sys.executable, environment: Mapping[str, str] | None = None
) -> Any:
    """JSON in the last line that `python -m module --child …` prints, in a process of its own."""
    return last_line([python, "-m", module, "--child", *map(str, arguments)], environment)


def last_line(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Any:
    """The JSON in the last line that a command prints. Raises RuntimeError with the command's own last words."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} … failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak_resident_bytes() -> int:
    """The most that this process has held, without what its parent held before it started, as `ru_maxrss` has it."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def run_module(child: Callable[..., Any], main: Callable[[], Any]) -> None:
    """Runs a benchmark's module: its command, or in a process of its own one part of the work."""
    if (words := child_arguments()) is not None:
        print("\n" + json.dumps(child(*words)))
    else:
        main()


def serve_or_run(serve: Callable[..., Any], main: Callable[[], Any]) -> None:
    """Runs a benchmark's module: its command, or in a process of its own a worker that answers."""
    if (words := child_arguments()) is not None:
        serve(*words)
    else:
        main()


def child_arguments() -> list[str] | None:
    """The arguments after `--child`, where this process is one."""
    return sys.argv[sys.argv.index("--child") + 1 :] if "--child" in sys.argv else None


class Worker:
    """A process that keeps a program ready, so that several which need much memory can take turns in steps.

    It answers each line of JSON on its input with one on its output; the first answer says that it is ready.
    """

    def __init__(self, module: str, *arguments: Any) -> None:
        command = [sys.executable, "-m", module, "--child", *map(str, arguments)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self._answer()

    def ask(self, question: str) -> Any:
        assert self._process.stdin is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise RuntimeError(f"a worker ended with code {self._process.wait()} before it answered")

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@contextlib.contextmanager
def worker(module: str, *arguments: Any) -> Iterator[Worker]:
    made = Worker(module, *arguments)
    try:
        yield made
    finally:
        made.close()


def answer(questions: Mapping[str, Callable[[], Any]], ready: Any) -> None:
    """The worker's side: answers until its input ends."""
    print("ANSWER " + json.dumps(ready), flush=True)
    for line in sys.stdin:
        print("ANSWER " + json.dumps(questions[json.loads(line)]()), flush=True)
