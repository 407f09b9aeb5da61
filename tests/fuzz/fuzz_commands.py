"""Random bad invocations of the command: `PYTHONPATH=tests/support python tests/fuzz/fuzz_commands.py [--seed 0]`.

Files, folders, options and the environment are drawn, most of them wrong in some way. A command ends with 0 and a result that
is one, or with 1 or 2 and one clean message; never with a traceback, and never with an error that nobody foresaw.
"""

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from disk import tiny_folders
from models import TEXT, make_model
from safetensors.torch import load_file
from texts import chats, pairs, rows, save_language_model, save_pretrained, small_tokenizer, write, write_splits
from typer.main import get_command
from typer.testing import CliRunner

from leanvocab.cli.app import app

UNFORESEEN = "No error of leanvocab's own foresaw this"
ENVIRONMENTS: list[dict[str, str | None]] = [
    {}, {"COLUMNS": "20"}, {"NO_COLOR": "1"}, {"LANG": "C", "LC_ALL": "C"}, {"TERM": "dumb"}, {"HOME": "/nowhere"},
    {"HF_HOME": "/proc/nowhere"}, {"COLUMNS": "0"}, {"TMPDIR": "/nowhere"}, {"HOME": None},
]  # fmt: skip


def make_inputs(folder: Path) -> None:
    """Data in `folder / "data"`, models in `folder / "models"`, and vocabularies: few of them as they should be."""
    _make_data(folder / "data")
    _make_models(folder / "models")
    tiny_folders(folder / "merging")
    (folder / "vocabularies").mkdir()
    CliRunner().invoke(
        app,
        [
            "count",
            str(folder / "data/good"),
            "--tokenizer",
            str(folder / "models/good"),
            "-o",
            str(folder / "vocabularies/good.json"),
        ],
    )
    good = json.loads((folder / "vocabularies/good.json").read_text())
    for name, changed in {"few": {"token_ids": [1, 2]}, "list": [], "none": None}.items():
        (folder / f"vocabularies/{name}.json").write_text(
            json.dumps(good | changed if isinstance(changed, dict) else changed)
        )


def _make_data(folder: Path) -> None:
    write_splits(folder / "good")
    write(folder / "good.csv", rows(24))
    write(folder / "good.jsonl", rows(24))
    write(folder / "good.parquet", rows(24))
    write(folder / "chats.jsonl", chats(12))
    write(folder / "pairs.jsonl", pairs(12))
    lines = (folder / "good.csv").read_text().splitlines()
    texts: dict[str, str | bytes] = {
        "empty.csv": "",
        "header.csv": "text,label\n",
        "twice.csv": "text,text,label\na,b,1\n",
        "one_class.csv": "text,label\n" + "a,1\n" * 9,
        "ragged.csv": "\n".join([*lines[:5], "a,b,c,d", *lines[5:]]),
        "quote.csv": '"text","label"\n"never closed,1\n' * 3,
        "latin.csv": "text,label\ncaf\xe9 word160,1\nword170,0\n".encode("latin-1"),
        "utf16.csv": "\n".join(lines).encode("utf-16"),
        "nul.csv": b"text,label\na\0b,1\nc,0\n",
        "binary.csv": bytes(range(256)) * 9,
        "bom.csv": b"\xef\xbb\xbf" + "\n".join(lines).encode(),
        "no_label.csv": "text\n" + "word170\n" * 9,
        "gaps.csv": "text,label\nword170,1\n,0\nword180,\nword190,0\n",
        "floats.csv": "text,label\nword170,1.5\nword180,nan\n",
        "all_labels.csv": "text,label\n" + "".join(f"word{i},name{i}\n" for i in range(20)),
        "unknown.csv": "text,label\n" + "zzz yyy xxx,1\nqqq,0\n" * 9,
        "half.jsonl": '{"text": "word170", "label": 1}\n{"text": "word',
        "list.jsonl": "[1, 2]\n[3]\n",
        "numbers.jsonl": '{"text": 1, "label": 1}\n{"text": 2, "label": 0}\n',
        "nested.jsonl": '{"text": {"a": ["word170"]}, "label": 1}\n' * 4,
        "mixed.jsonl": '{"text": "word170", "label": 1}\n{"text": 5, "label": "x"}\n',
        "empty.jsonl": "",
        "array.json": json.dumps(rows(12)),
        "object.json": "{}",
        "null.json": "null",
        "broken.json": "[{",
        "roles.jsonl": '{"messages": [{"role": "wizard", "content": "word170"}]}\n' * 4,
        "no_content.jsonl": '{"messages": [{"role": "user"}]}\n' * 4,
        "strings.jsonl": '{"messages": "word170"}\n' * 4,
        "ids.jsonl": '{"input_ids": [1, 2, 3]}\n' * 4,
        "bad_ids.jsonl": '{"input_ids": [1, -2, 999999]}\n' * 4,
        "cut.parquet": (folder / "good.parquet").read_bytes()[:200],
        "text.parquet": "no parquet",
        "empty.txt": "",
        "words.txt": "word170 word180\n" * 9,
        "table.xlsx": b"PK\3\4",
        "some.gz": b"\x1f\x8b\0",
        "none": "",
    }
    for name, content in texts.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "empty folder").mkdir()
    (folder / "odd names").mkdir()
    shutil.copy(folder / "good.csv", folder / "odd names" / "a.csv")
    shutil.copy(folder / "good.csv", folder / "odd names" / "b.csv")
    (folder / "loop.csv").symlink_to(folder / "loop.csv")
    (folder / "folder.csv").mkdir()


def _make_models(folder: Path) -> None:
    good = save_pretrained(folder / "good")
    save_language_model(folder / "causal", "gpt2", tied=True)
    save_language_model(folder / "seq2seq", "t5", tied=False)
    save_pretrained(folder / "small", make_model("bert", TEXT, vocab_size=40, num_labels=2).base_model)
    broken: dict[
        str, tuple[str, bytes | None]
    ] = {  # name → (the file that is another, its content; None: it is not there)
        "no tokenizer": ("tokenizer.json", None),
        "no weights": ("model.safetensors", None),
        "no config": ("config.json", None),
        "cut weights": ("model.safetensors", (good / "model.safetensors").read_bytes()[:5000]),
        "text weights": ("model.safetensors", b"weights"),
        "broken config": ("config.json", b"{"),
        "list config": ("config.json", b"[]"),
        "unknown type": ("config.json", b'{"model_type": "nobody"}'),
        "empty config": ("config.json", b"{}"),
        "broken tokenizer": ("tokenizer.json", b"{}"),
    }
    for name, (file, content) in broken.items():
        shutil.copytree(good, folder / name)
        (folder / name / file).unlink()
        if content is not None:
            (folder / name / file).write_bytes(content)
        elif file == "tokenizer.json":
            (folder / name / "tokenizer_config.json").unlink()
    small_tokenizer().save_pretrained(folder / "tokenizer alone")
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "nobody/nothing"}'
    )
    (folder / "empty").mkdir()
    (folder / "pickle").mkdir()
    shutil.copy(good / "config.json", folder / "pickle/config.json")
    (folder / "pickle/pytorch_model.bin").write_bytes(b"\x80\x04.")


VALUES = [
    "0",
    "1",
    "-1",
    "0.5",
    "1e99",
    "nan",
    "many",
    "",
    "3",
    "none",
    "full",
    "delta",
    "frozen",
    "steps",
    "text",
    "label",
    "é",
    "9" * 30,
]
COMMANDS: Any = get_command(app).commands  # type: ignore[attr-defined]
TASKS = ["classification", "regression", "causal-lm", "seq2seq-lm", "masked-lm", "translation"]


def invocations(seed: int, folder: Path) -> Iterator[tuple[list[str], dict[str, str | None]]]:
    """(words, environment) without end; each is drawn from the seed alone."""
    chance = random.Random(seed)
    number = 0
    while True:
        number += 1
        yield (
            _words(chance, folder, folder / f"out-{number}"),
            chance.choice(ENVIRONMENTS if chance.random() < 0.3 else [{}]),
        )


def _words(chance: random.Random, folder: Path, out: Path) -> list[str]:
    data = [str(path) for path in sorted((folder / "data").iterdir())] + [
        str(folder / "nothing.csv"),
        "no/such/data",
        "",
    ]
    models = [str(path) for path in sorted((folder / "models").iterdir())] + [
        "no/such-model",
        "",
        str(folder / "data/good.csv"),
    ]
    vocabularies = [str(path) for path in sorted((folder / "vocabularies").iterdir())]
    model = (
        chance.choice(models)
        if chance.random() < 0.4
        else str(folder / "models" / chance.choice(["good", "causal", "seq2seq"]))
    )
    source = (
        chance.choice(data)
        if chance.random() < 0.7
        else str(folder / "data" / chance.choice(["good", "good.jsonl", "chats.jsonl", "pairs.jsonl"]))
    )
    outputs = [str(out)] * 8 + [str(folder / "data/good.csv"), str(folder / "models/good"), "/proc/nowhere/out", ""]
    command = chance.choice(
        ["finetune"] * 5 + ["count", "count", "estimate", "estimate", "info", "merge", "delta", "trim", "trim"]
    )
    words = [command]
    if command == "finetune":
        words += [model, source, "-o", chance.choice(outputs), "--cpu"]
        words += ["--task", chance.choice(TASKS)] if chance.random() < 0.5 else []
    elif command == "count":
        words += [source, *(["--tokenizer", model] if chance.random() < 0.8 else []), "-o", chance.choice(outputs)]
    elif command == "estimate":
        words += [
            model,
            *chance.choice([["--rows", "9"], ["--data", source], ["--vocabulary", chance.choice(vocabularies)]]),
        ]
    elif command == "info":
        words += [chance.choice([*models, *data, *vocabularies, str(folder / "merging/delta")])]
    elif command == "trim":
        over = [str(folder / "merging/delta")] if chance.random() < 0.2 else []
        fits = chance.random() < 0.5
        kept = str(folder / "vocabularies/good.json") if fits else chance.choice(vocabularies)
        words += [
            str(folder / "models/good") if fits else model,
            *over,
            "--vocabulary",
            kept,
            "-o",
            chance.choice(outputs),
        ]
    else:
        places = [*(str(path) for path in sorted((folder / "merging").iterdir())), model, str(folder / "nothing")]
        words += [chance.choice(places), chance.choice(places), chance.choice(outputs)][
            : chance.choice([1, 2, 3, 3, 3, 3])
        ]
    for _ in range(chance.choice([0, 1, 1, 2, 3])):
        words += _option(chance, command, [*VALUES, source, chance.choice(vocabularies)])
    words += ["--max-steps", "2", "--max-train-samples", "8"] if command == "finetune" else []  # the last one counts
    return [*words, "--json"] if chance.random() < 0.3 else words


def _option(chance: random.Random, command: str, values: list[str]) -> list[str]:
    """An option that the command has, with a value that it may take or not; now and then another command's."""
    params = COMMANDS[command if chance.random() < 0.95 else chance.choice(sorted(COMMANDS))].params
    option = chance.choice([param for param in params if param.param_type_name == "option"])
    if getattr(option, "is_flag", False):
        return [option.opts[0]]
    numbers = {"int": ["1", "3", "0"], "float": ["0.5", "1", "0", "nan"]}.get(option.bare_type(), values)
    return [option.opts[0], chance.choice(numbers if chance.random() < 0.8 else values)]


def problem(words: list[str], code: int, stdout: str, stderr: str) -> str | None:
    """What is wrong with how a command ended; None where nothing is."""
    if code not in (0, 1, 2):
        return f"exit code {code}"
    said = stdout + stderr
    if "Traceback (most recent" in said or UNFORESEEN in said:
        return "an error that nobody foresaw"
    if "--json" in words:
        try:
            content = json.loads(stdout)
        except ValueError:
            return "--json printed something else"
        if ("error" in content) != (code != 0):
            return f"exit code {code} and JSON {'with' if 'error' in content else 'without'} an error"
    return _false_success(words) if code == 0 else None


def _false_success(words: list[str]) -> str | None:
    if words[0] == "finetune":
        out = Path(words[words.index("-o") + 1])
        account = json.loads((out / "finetune.json").read_text())
        losses = [loss for _, loss in account["losses"]]
        if not all(math.isfinite(loss) for loss in losses):
            return "success with a loss that is not finite"
        for path in out.glob("*.safetensors"):
            if not all(tensor.isfinite().all() for tensor in load_file(path).values() if tensor.is_floating_point()):
                return "success with weights that are not finite"
        kept = account["vocabulary"]
        if kept is not None and kept["kept_rows"] <= 5:
            return "success with special ids alone"
    if words[0] in ("merge", "delta") and "--in-place" not in words and not Path(words[3]).is_dir():
        return "success without an output"
    if words[0] == "trim":  # of options that are given twice the last one counts
        output = [value for option, value in pairwise(words) if option in ("-o", "--output")][-1]
        if not Path(output, "trimming.json").is_file():
            return "success without an output"
    return None


@contextlib.contextmanager
def environment(changes: dict[str, str | None]) -> Iterator[None]:
    """`os.environ` with changes, within the block."""
    before = dict(os.environ)
    for name, value in changes.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_here(words: list[str], changes: dict[str, str | None]) -> str | None:
    """What is wrong with how a command ends in this process."""
    with environment(changes):
        result = CliRunner().invoke(app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"{result.exception!r}"
    found = problem(words, result.exit_code, result.stdout, result.stderr)
    return found and f"{found}: {(result.stderr or result.stdout).strip().splitlines()[-1:]}"


def run_as_process(words: list[str], changes: dict[str, str | None]) -> str | None:
    """The same in a process of its own."""
    with environment(changes):
        done = subprocess.run(
            [sys.executable, "-m", "leanvocab", *words], capture_output=True, text=True, check=False, timeout=300
        )
    found = problem(words, done.returncode, done.stdout, done.stderr)
    return found and f"{found}: {(done.stderr or done.stdout).strip().splitlines()[-1:]}"


def fuzz(
    folder: Path, seed: int, count: int, num_processes: int = 0
) -> Iterator[tuple[list[str], dict[str, str | None], str]]:
    """The invocations that end in a way that is wrong."""
    make_inputs(folder)
    os.chdir(folder)  # where relative paths go
    drawn = invocations(seed, folder)
    for number in range(count):
        words, changes = next(drawn)
        run: Any = run_as_process if number < num_processes else run_here
        if found := run(words, changes):
            yield words, changes, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--processes", type=int, default=20, help="so many of them in processes of their own")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wrong = 0
        for words, changes, found in fuzz(Path(folder), options.seed, options.count, options.processes):
            wrong += 1
            print(f"{found}\n  {changes} leanvocab {' '.join(map(repr, words))}", flush=True)
    print(f"{options.count} invocations, {options.processes} of them as processes: {wrong} ended wrongly")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
