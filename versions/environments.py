"""The environments: what each is for, and what it pins. Each is made in a folder of its own below .cache/versions."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY / ".cache" / "versions"
EXTRAS = "finetune,peft,plot,sentence-transformers,trl"
FOR_TESTS = ("hypothesis", "psutil", "pytest", "pytest-timeout", "scikit-learn", "scipy")
# What is named in the table.
SHOWN = ("torch", "transformers", "numpy", "peft", "trl", "sentence-transformers")


@dataclass(frozen=True)
class Environment:
    """A row of the table."""

    name: str
    why: str
    pins: tuple[str, ...] = ()
    extras: str = EXTRAS
    python: str = ""  # the running one by default

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    def interpreter(self) -> list[str] | None:
        """The command that makes its Python start; None where this machine has none of that version."""
        found = shutil.which(f"python{self.python}") if self.python else sys.executable
        works = found and subprocess.run([found, "-c", "import venv"], capture_output=True, check=False).returncode == 0
        return [found] if found and works else None


# An old torch is one of 3 GB with CUDA where an index has no other: the pins of transformers go with the one of constraints.txt.
_TORCH = next(line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
# What pyproject.toml names as the oldest, all at once, but for TRL, which asks for newer datasets and accelerate.
_OLDEST = (
    "torch==2.11.0", "transformers==5.0.0", "numpy==2.0.0", "pyarrow==18.0.0", "rich==13.7.0", "safetensors==0.5.0",
    "tqdm==4.66.3", "typer==0.18.0", "accelerate==1.10.0", "datasets==3.6.0", "sentencepiece==0.2.0", "peft==0.18.1",
    "sentence-transformers==5.2.0",
)  # fmt: skip
ENVIRONMENTS = (
    Environment("oldest", "the oldest of everything", _OLDEST, "finetune,peft,plot,sentence-transformers"),
    Environment("transformers-5.0", "the oldest transformers", ("transformers==5.0.0", _TORCH)),
    Environment("transformers-5.3", "PyLate's pin", ("transformers==5.3.0", _TORCH)),
    Environment("transformers-5.6", "LLaMA-Factory's pin", ("transformers==5.6.2", _TORCH)),
    Environment("transformers-5.16", "axolotl 0.19's pin, and GLiNER's", ("transformers==5.16.1", _TORCH)),
    Environment("transformers-5.17", "Unsloth's pin", ("transformers==5.17.0", _TORCH)),
    Environment("transformers-5.19", "ms-swift's pin", ("transformers<5.20", _TORCH)),
    Environment("transformers-5.20", "axolotl 0.21's pin", ("transformers==5.20.1", _TORCH)),
    Environment("newest", "the newest of everything"),
    Environment("python-3.12", "the newest of everything", python="3.12"),
    Environment("python-3.13", "the newest of everything", python="3.13"),
    Environment("python-3.14", "the newest of everything", python="3.14"),
)


def made(environment: Environment) -> str | None:
    """Makes an environment, unless it is there. The reason why this machine cannot have it, None where it has."""
    start = environment.interpreter()
    if start is None:
        return f"no Python {environment.python} with venv here"
    done = environment.folder / ".installed"
    if done.exists():
        return None
    wanted = [*FOR_TESTS, f"{REPOSITORY}[{environment.extras}]", *environment.pins]
    for command in (
        [*start, "-m", "venv", "--clear", str(environment.folder)],
        [str(python_of(environment)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted],
        # What is tested is the working tree.
        [str(python_of(environment)), "-m", "pip", "uninstall", "--quiet", "--yes", "leanvocab"],
    ):
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            return (ended.stderr.strip().splitlines() or ["no reason given"])[-1]
    done.touch()
    return None


def python_of(environment: Environment) -> Path:
    return environment.folder / "bin" / "python"


def versions_in(python: list[str]) -> dict[str, str]:
    """The versions of Python and of what the table names, as an interpreter finds them."""
    program = (
        "import json, platform, importlib.metadata as m\n"
        f"names = [n for n in {SHOWN!r} if any(m.distributions(name=n))]\n"
        "print(json.dumps({'Python': platform.python_version()} | {n: m.version(n) for n in names}))"
    )
    told = subprocess.run([*python, "-c", program], capture_output=True, text=True, check=True).stdout
    return dict(json.loads(told))


def surroundings() -> dict[str, str]:
    """The variables that suites run with: the working tree's package, and one thread."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1"}
