"""Calls in processes of their own, which are forked from one that has torch and transformers imported: that takes most of a run.

leanvocab is not imported there, so that a process can go without it.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch", "transformers.trainer", "transformers.models.auto.modeling_auto"])

# Starting a process asks every other that this one started how it ended, and the first who asks is the only one to be told:
# without this a thread that joins one meanwhile is told 255.
_ENDS = threading.Lock()


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module returns, called in another process; fails where that ends without it."""
    answers, asked = _FORKS.Pipe(duplex=False)
    process = _FORKS.Process(target=_answer, args=(asked, function, arguments))
    with _ENDS:
        process.start()
    asked.close()
    try:
        kind, answer = answers.recv()
    except EOFError:
        kind, answer = "died", None
    with _ENDS:
        process.join()
    assert (kind, process.exitcode) == ("returned", 0), f"{kind} with exit code {process.exitcode}: {answer}"
    return answer


def _answer(asked: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    warnings.filterwarnings("error", category=UserWarning, module="leanvocab")
    try:
        asked.send(("returned", function(*arguments)))
    except BaseException as error:
        asked.send((f"raised {error!r}", traceback.format_exc()[-3000:]))


def run_program(
    program: Path | str, words: list[str], environment: dict[str, str], launcher: list[str] | None, folder: Path
) -> tuple[int, str]:
    """(exit code, what it printed) of a Python file, or a module by its name, run as a user runs it.

    By a launcher (`["-m", "torch.distributed.run", …]`), if there is one. `folder` is for what it prints.
    """
    if launcher is not None:
        named = [str(program)] if isinstance(program, Path) else ["-m", program]
        command, every = [sys.executable, *launcher, *named, *words], {**os.environ, **environment}
        done = subprocess.run(command, env=every, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr
    code: int = in_own_process(_run_here, program, words, environment, folder / "printed")
    return code, (folder / "printed").read_text()


def _run_here(program: Path | str, words: list[str], environment: dict[str, str], printed: Path) -> int:
    os.environ.update(environment)
    sys.argv = [str(program), *words]
    warnings.resetwarnings()
    with printed.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    try:
        run: Any = runpy.run_path if isinstance(program, Path) else runpy.run_module
        run(str(program), run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
    return 0
