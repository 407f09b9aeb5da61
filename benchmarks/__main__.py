"""`python -m benchmarks`: the list. `python -m benchmarks NAME …`: one of them; `all`: each in turn; `report`: the page.

`python -m benchmarks gpu`: everything that waits for a GPU.
"""

import importlib
import subprocess
import sys
import time

from benchmarks import _gpu, _report
from benchmarks._command import About

NAMES = (
    "startup",
    "counting",
    "counting_shapes",
    "text_counting",
    "vocabulary",
    "shrinking",
    "merge",
    "trimming",
    "training_step",
    "epoch",
    "output_side",
    "language_step",
    "qlora_step",
    "fits",
    "estimate",
    "per_layer_tables",
    "growing",
    "one_line",
    "new_tokens",
    "trimming_peers",
    "trimming_use",
)

LONG_ON_A_CPU = (
    "qlora_step",
    "estimate",
    "per_layer_tables",
    "growing",
    "one_line",
    "new_tokens",
    "text_counting",
    "trimming_peers",
    "trimming_use",
    "trimming",
    "trimming_peers",
    "trimming_use",
)  # with the rest they would not fit into half an hour


def abouts() -> list[About]:
    """Descriptions of the benchmarks, in the order of the page."""
    return [importlib.import_module(f"benchmarks.{name}").ABOUT for name in NAMES]


def run_all(arguments: list[str]) -> int:
    """Each in a process of its own, with the same options; the number that failed."""
    failed = []
    for name in NAMES:
        if name in LONG_ON_A_CPU and "cuda" not in arguments and "small" not in arguments:
            print(f"== {name}: long on a CPU, run it by its name", flush=True)
            continue
        print(f"== python -m benchmarks {name} {' '.join(arguments)}", flush=True)
        start = time.perf_counter()
        if subprocess.run([sys.executable, "-m", "benchmarks", name, *arguments]).returncode:
            failed.append(name)
        print(f"== {name}: {time.perf_counter() - start:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


def main(arguments: list[str]) -> int:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("list", [])
    if name in NAMES:
        importlib.import_module(f"benchmarks.{name}").main(rest)
        return 0
    if name == "all":
        return run_all(rest)
    if name == "gpu":
        return _gpu.main(rest)
    if name == "report":
        return _report.main(abouts(), rest)
    print("python -m benchmarks NAME [--size small] [--json] [--seconds BUDGET] … | all … | report | gpu\n")
    for about in abouts():
        print(f"{about.name}\n" + "\n".join(f"    {line}" for line in str(about).splitlines()))
    return 0 if name in ("list", "-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
