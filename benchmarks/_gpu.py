"""`python -m benchmarks gpu`: everything that waits for a GPU, within 25 minutes, the most important first.

Each part is a process of its own with a limit of its own, so that none costs another. After each of them two files are written
anew: `gpu.json`, and `gpu.md`, which shows counted figures beside those that were measured. Counted figures come from
`counted.json`, which `--device paper` makes on any machine with torch 2.13. Loads no torch itself, and needs no installing.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._report import result_lines, table
from benchmarks._results import Result, Series
from benchmarks._tables import quantity

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).parent / "results" / "gpu"
COUNTED = FOLDER / "counted.json"
MINUTES = 25.0
LEAST_SECONDS = 15.0  # in which a part can do anything


@dataclass(frozen=True)
class Part:
    """A command, how long it may take, and what must be installed for it."""

    name: str
    words: Callable[["Run"], list[str]]  # of `python -m`
    seconds: float
    needs: tuple[str, ...] = ("torch", "transformers")
    is_counted: bool = False  # it has figures on paper too


@dataclass(frozen=True)
class Run:
    """Where the parts run: on "cuda", on a "cpu" to see that they work, or on "paper"; tiny ones or of published sizes."""

    device: str
    is_tiny: bool
    seconds: float = 0.0  # what the part may take

    def benchmark(self, name: str, *words: str) -> list[str]:
        """A benchmark's command; tiny ones have a size of their own instead of `words`."""
        size = ["--size", "small", "--rounds", "1", "--no-peers"] if self.is_tiny else [*words, "--no-peers"]
        results = [] if self.device == "cuda" else ["--no-results"]
        budget = ["--seconds", f"{0.8 * self.seconds:.0f}"]
        return ["benchmarks", name, "--device", self.device, *size, *budget, "--json", *results]


def _tests(run: Run) -> list[str]:
    few = ["-k", "evaluation or unseen or logits"] if run.is_tiny else []
    return ["pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", *few]


def _doors(run: Run) -> list[str]:
    return ["doors", "--gpu", "--json", *([] if run.device == "cuda" else ["--dry"])]


def _loss(rows: int, dim: int) -> Callable[[Run], list[str]]:
    words = ["--dtype", "bfloat16", "--dim", str(dim), "--cases", f"{rows}x8192"]
    return lambda run: run.benchmark("output_side", *words)


def _language(run: Run) -> list[str]:
    return run.benchmark(
        "language_step", "--dtype", "bfloat16", "--length", "512", "--models", "gemma-3-270m", "qwen3-0.6b"
    )


def _fits(run: Run) -> list[str]:
    return run.benchmark(
        "fits", "--models", "gemma-3-270m", "qwen3-0.6b", "--precisions", "bf16", "--gibibytes", "8", "16"
    )


PARTS = (
    Part("tests", _tests, 240, ("torch", "transformers", "pytest", "accelerate")),
    Part("loss, Gemma-2-2B's shape", _loss(256_000, 2304), 150, is_counted=True),
    Part("loss, Qwen3-1.7B's shape", _loss(151_936, 2048), 120, is_counted=True),
    Part("language_step", _language, 180, is_counted=True),
    Part(
        "qlora_step",
        lambda run: run.benchmark("qlora_step", "--models", "qwen3-0.6b", "gemma-3-1b"),
        180,
        ("torch", "transformers", "bitsandbytes", "peft"),
        is_counted=True,
    ),
    Part("doors", _doors, 120, ("torch", "transformers", "accelerate", "datasets")),
    Part(
        "training_step",
        lambda run: run.benchmark("training_step", "--models", "xlm-r-base"),
        210,
        ("torch", "transformers", "peft"),
        is_counted=True,
    ),
    Part("fits", _fits, 300, is_counted=True),
)


@dataclass
class Done:
    """What came of a part."""

    name: str
    status: str  # "done", "failed", "over its limit" or "skipped"
    why: str = ""
    seconds: float = 0.0
    command: str = ""
    results: list[dict[str, Any]] = field(default_factory=list)
    last_words: str = ""


def run_part(part: Part, run: Run) -> Done:
    """Runs a part; never raises."""
    absent = [package for package in part.needs if importlib.util.find_spec(package) is None]
    if absent:
        return Done(part.name, "skipped", f"not installed: {', '.join(absent)}")
    if run.device == "paper" and not part.is_counted:
        return Done(part.name, "skipped", "it has no figures on paper")
    if run.seconds < LEAST_SECONDS:
        return Done(part.name, "skipped", "no time is left for it")
    words = part.words(run)
    start = time.perf_counter()
    code, said = run_within(run.seconds, [sys.executable, "-m", *words], run)
    done = Done(part.name, "done", seconds=time.perf_counter() - start, command="python -m " + " ".join(words))
    lines = said.replace(str(ROOT), ".").splitlines()
    done.results = [json.loads(line) for line in lines if line.startswith('{"benchmark"')]
    if code != 0:
        done.last_words = "\n".join(line for line in lines if not line.startswith('{"benchmark"'))[-3000:]
    if code is None:
        done.status, done.why = "over its limit", f"of {run.seconds:.0f} s"
    elif code:
        done.status, done.why = "failed", f"exit status {code}"
    return done


def run_within(seconds: float, command: Sequence[str], run: Run) -> tuple[int | None, str]:
    """(exit status, all that it said); None where it took longer, and it and all that it had started were ended."""
    source, before = str(ROOT / "src"), os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([source, *([before] if before else [])]),
        "HF_HUB_OFFLINE": "1",
        "LEANVOCAB_TEST_DEVICE": run.device,
    }
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0]
        return process.returncode, said


# --- what came of it --------------------------------------------------------------------------------------------------


def write(folder: Path, run: Run, parts: Sequence[Done], counted: Sequence[Result]) -> None:
    """Both files, anew."""
    folder.mkdir(parents=True, exist_ok=True)
    head = {"date": datetime.date.today().isoformat(), "device": run.device, "tiny": run.is_tiny}
    content = {**head, "parts": [asdict(done) for done in parts]}
    (folder / "gpu.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "gpu.md").write_text(render(head, parts, counted))


def render(head: dict[str, Any], parts: Sequence[Done], counted: Sequence[Result]) -> str:
    """The page: what ran, counted figures beside measured ones, then all results."""
    lines = [f"# On a GPU: {head['device']}, {head['date']}", ""]
    if head["device"] != "cuda":
        lines += ["No GPU: this shows that the parts run, and nothing about a GPU.", ""]
    rows = [[done.name, f"{done.status} {done.why}".strip(), f"{done.seconds:.0f} s"] for done in parts]
    lines += [table(["part", "outcome", "time"], rows), "## Counted beside measured", ""]
    results = [Result.of(content) for done in parts for content in done.results]
    beside = list(beside_counted(results, counted))
    header = ["", "figure", "program", "measured", "counted", "counted / measured"]
    lines += [table(header, beside) if beside else "Nothing was both counted and measured.\n"]
    for result in results:
        lines += result_lines(result)
    for done in parts:
        if done.status in ("failed", "over its limit"):
            lines += [f"## {done.name}: {done.status}", "", "```", done.last_words, "```", ""]
    return "\n".join(lines) + "\n"


def beside_counted(results: Sequence[Result], counted: Sequence[Result]) -> Iterator[list[str]]:
    """Rows of figures that were measured on a GPU and counted for the same case."""
    on_paper = {_key(result, series): series.median for result in counted for series in result.series}
    for result in results:
        for series in result.series:
            found = on_paper.get(_key(result, series))
            if result.device == "cuda" and found is not None:
                ratio = f"{found / series.median:.3f}" if series.median else ""
                figure = f"{series.measure}, {series.case}"
                values = [quantity(value, series.unit) for value in (series.median, found)]
                yield [f"{result.benchmark} {result.subject}", figure, series.who, *values, ratio]


def _key(result: Result, series: Series) -> tuple[str, ...]:
    return result.benchmark, result.subject, series.measure.removeprefix("counted: "), series.case, series.who


def read_counted(path: Path) -> list[Result]:
    """Counted figures; none where the file is not there."""
    content = json.loads(path.read_text()) if path.exists() else {"parts": []}
    return [Result.of(result) for part in content["parts"] for result in part["results"]]


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: list[str], parts: Sequence[Part] = PARTS) -> int:
    """The number of parts that failed or were over their limit."""
    options = read_options(arguments, parts)
    if options.device == "cuda" and not has_gpu():
        print("no GPU here: --device cpu --tiny goes through every part all the same", file=sys.stderr)
        return 2
    minutes = 600 if options.device == "paper" else options.minutes  # counting takes what it takes
    end = time.perf_counter() + 60 * minutes
    counted, done = read_counted(COUNTED), []
    for part in [each for each in parts if not options.only or each.name in options.only]:
        left = end - time.perf_counter()
        seconds = left if options.device == "paper" else min(part.seconds, left)
        done.append(run_part(part, Run(options.device, options.tiny, seconds)))
        print(f"{done[-1].name}: {done[-1].status} {done[-1].why} ({done[-1].seconds:.0f} s)", flush=True)
        if options.device == "paper":
            options.out.mkdir(parents=True, exist_ok=True)
            content = {"parts": [{**asdict(each), "last_words": ""} for each in done if each.results]}
            (options.out / COUNTED.name).write_text(json.dumps(content, indent=1) + "\n")
        else:
            write(options.out, Run(options.device, options.tiny), done, counted)
    return sum(each.status in ("failed", "over its limit") for each in done)


def has_gpu() -> bool:
    """Asked in a process of its own: a GPU that this one had touched would be shared with every part."""
    code, said = run_within(
        120, [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"], Run("cuda", False)
    )
    return code == 0 and said.strip().endswith("True")


def read_options(arguments: list[str], parts: Sequence[Part]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu", "paper"), default="cuda", help="cpu: to see that they work")
    parser.add_argument("--tiny", action="store_true", help="small sizes, and few tests")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all parts together ({MINUTES:g})")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in parts], help="these parts alone")
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help="folder of gpu.json and gpu.md (benchmarks/results/gpu)"
    )
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu is to see that the parts work: give --tiny too")
    return options
