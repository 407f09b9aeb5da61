"""What a trimmed model is in use, beside the whole one: files, loading, memory, tokens a second, and its scores.

multilingual-e5-small is trained on pairs (a premise of XNLI and a hypothesis that follows from it, English and German; in-batch
negatives, with the vocabulary shrunk), merged, counted over these two languages and trimmed to them; all-MiniLM-L6-v2 is trimmed
as it is, to the English texts. Each use is a process of its own: PyTorch with transformers, and onnxruntime with
tokenizers alone, after an export by `torch.onnx.export`. The score is the share of 400 premises of the test set whose hypothesis
is the nearest of 400: once with the texts counted, and once with a vocabulary that has seen the validation set alone.
"""

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks._command import About, finish, parser, read_options
from benchmarks._peers import installed
from benchmarks._results import OURS, Figure, Result, Series, beside_ours
from benchmarks._rounds import Budget, peak_resident_bytes, run_child, run_module, turns

ABOUT = About(
    name="trimming_use",
    measures="A trimmed model beside the whole one: size, load time, memory, tokens a second, scores; PyTorch and onnxruntime.",
    beside="the whole model",
    limit="the same scores on covered texts",
    budget_seconds=900,
)
MODULE = "benchmarks.trimming_use"
WHOLE = "the whole model"
MODELS = Path(__file__).resolve().parents[1] / ".cache" / "models"
SHARED = Path(os.environ.get("LEANVOCAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
LANGUAGES = {"e5-small": ("en", "de"), "minilm": ("en",), "made": ("en",)}
ENTAILMENT = 0
_MB = 1e6


def read_pairs(model: str, split: str, most: int) -> list[tuple[str, str]]:
    """Premises, each with a hypothesis that follows from it, as many of each language."""
    if model == "made":
        words = [f"word{number % 90}" for number in range(40 * most)]
        return [(" ".join(words[at : at + 4]), " ".join(words[at + 1 : at + 5])) for at in range(0, 7 * most, 7)]
    import pyarrow.parquet

    pairs: list[tuple[str, str]] = []
    for language in LANGUAGES[model]:
        rows = pyarrow.parquet.read_table(SHARED / "xnli" / f"xnli.{language}.{split}.parquet").to_pylist()
        pairs += [(row["premise"], row["hypothesis"]) for row in rows if row["label"] == ENTAILMENT][:most]
    return pairs


def make_base(folder: Path) -> None:
    """A small model of words, for the small size."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *(f"word{number}" for number in range(100))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), pad_token_id=0, **sizes)).save_pretrained(folder)


def train(model: str, base: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Train with the vocabulary shrunk, and save the whole model."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    import leanvocab as lv

    tokenizer, encoder = AutoTokenizer.from_pretrained(base), AutoModel.from_pretrained(base)
    pairs = read_pairs(model, "validation", 800)
    counts = lv.count_tokens([text for pair in pairs for text in pair], tokenizer=tokenizer)
    lv.shrink_(encoder, lv.PartialVocabulary.from_counts(counts, tokenizer=tokenizer, model=encoder))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-5, weight_decay=0.0)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    losses = []
    for step in range(steps):
        batch = [pairs[order[at % len(pairs)]] for at in range(16 * step, 16 * step + 16)]
        firsts, seconds = (embed(encoder, tokenizer, [pair[side] for pair in batch], cut=64) for side in (0, 1))
        loss = torch.nn.functional.cross_entropy(20 * firsts @ seconds.T, torch.arange(len(batch)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    lv.save_full(encoder, folder)
    tokenizer.save_pretrained(folder)
    return {"first_loss": losses[0], "last_loss": losses[-1]}


def embed(encoder: Any, tokenizer: Any, texts: list[str], cut: int = 128) -> Any:
    """Embeddings of unit length: means over tokens."""
    import torch

    given = tokenizer(texts, padding=True, truncation=True, max_length=cut, return_tensors="pt")
    mask = given["attention_mask"].unsqueeze(-1)
    states = encoder(**given).last_hidden_state * mask
    return torch.nn.functional.normalize(states.sum(1) / mask.sum(1), dim=-1)


def trim(model: str, base: Path, folder: Path, *splits: str) -> dict[str, Any]:
    """Trim to the texts of some splits; what the result says of itself."""
    from transformers import AutoConfig, AutoTokenizer

    import leanvocab as lv
    from leanvocab.trimming.export import export_trimmed

    tokenizer, config = AutoTokenizer.from_pretrained(base), AutoConfig.from_pretrained(base)
    texts = [text for split in splits for pair in read_pairs(model, split, 10_000) for text in pair]
    counts = lv.count_tokens(texts, tokenizer=tokenizer, progress=False)
    vocabulary = lv.PartialVocabulary.from_counts(counts, tokenizer=tokenizer, model=config)
    result = export_trimmed(base, vocabulary, folder, progress=False)
    return {"rows": result.rows_after, "full_rows": result.rows_before, "seconds": result.seconds}


def export(folder: Path) -> int:
    """The model in a folder as ONNX beside it: its bytes."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    encoder, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    example = dict(tokenizer(["one text", "and another, longer one"], padding=True, return_tensors="pt"))
    sizes = {name: dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC) for name in example}
    file = folder / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter, about its own parts
        torch.onnx.export(
            encoder,
            (),
            file,
            kwargs=example,
            dynamo=True,
            dynamic_shapes=sizes,
            input_names=list(example),
            verbose=False,
        )
    return _bytes(folder, "model.onnx*")


def use(model: str, folder: str, runtime: str) -> dict[str, Any]:
    """Loading, one text, and many, in one process: seconds, tokens a second, and the peak of memory."""
    texts = [text for pair in read_pairs(model, "test", 50) for text in pair]
    start = time.perf_counter()
    run = _torch_program(folder) if runtime == "PyTorch" else _onnx_program(folder)
    loaded = time.perf_counter()
    run(texts[:8])
    latencies = [_seconds(run, [text])[0] for text in texts[:20]]
    seconds, num_tokens = _seconds(run, texts)
    return {
        "load_seconds": loaded - start,
        "latency_seconds": sorted(latencies)[len(latencies) // 2],
        "tokens_per_second": num_tokens / seconds,
        "peak_bytes": peak_resident_bytes(),
    }


def _seconds(run: Callable[[list[str]], int], texts: list[str]) -> tuple[float, int]:
    start, num_tokens = time.perf_counter(), 0
    for at in range(0, len(texts), 16):
        num_tokens += run(texts[at : at + 16])
    return time.perf_counter() - start, num_tokens


def _torch_program(folder: str) -> Callable[[list[str]], int]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    encoder, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def run(texts: list[str]) -> int:
        given = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.inference_mode():
            encoder(**given)
        return int(given["attention_mask"].sum())

    return run


def _onnx_program(folder: str) -> Callable[[list[str]], int]:
    import numpy as np
    import onnxruntime
    from tokenizers import Tokenizer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
    session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    pad = json.loads(Path(folder, "config.json").read_text())["pad_token_id"]
    tokenizer.enable_padding(pad_id=pad)
    names = {each.name for each in session.get_inputs()}

    def run(texts: list[str]) -> int:
        encoded = tokenizer.encode_batch(texts)
        every = {
            "input_ids": np.array([each.ids for each in encoded], np.int64),
            "attention_mask": np.array([each.attention_mask for each in encoded], np.int64),
            "token_type_ids": np.array([each.type_ids for each in encoded], np.int64),
        }
        session.run(None, {name: array for name, array in every.items() if name in names})
        return int(every["attention_mask"].sum())

    return run


def score(model: str, folder: Path) -> dict[str, Any]:
    """The nearest hypothesis of each premise, and of how many it is their own."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    encoder, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    pairs = read_pairs(model, "test", 400 // len(LANGUAGES[model]))
    sides = []
    with torch.inference_mode():
        for side in (0, 1):
            texts = [pair[side] for pair in pairs]
            sides.append(torch.cat([embed(encoder, tokenizer, texts[at : at + 16]) for at in range(0, len(texts), 16)]))
    nearest = (sides[0] @ sides[1].T).argmax(1)
    return {"right": int((nearest == torch.arange(len(pairs))).sum()), "nearest": nearest.tolist()}


def measure(options: argparse.Namespace) -> Iterator[Result]:
    budget = Budget(options.seconds)
    for model in ("made",) if options.size == "small" else options.models:
        if model != "made" and not (MODELS / model).is_dir():
            continue
        with tempfile.TemporaryDirectory() as folder:
            yield measure_model(model, Path(folder), options, budget)


def measure_model(model: str, folder: Path, options: argparse.Namespace, budget: Budget) -> Result:
    """Everything of one model."""
    base, about = MODELS / model, dict[str, Any]()
    if model == "made":
        base = folder / "made"
        make_base(base)
    folders = {WHOLE: folder / "whole", OURS: folder / "trimmed"}
    steps = {"e5-small": options.steps, "minilm": 0, "made": 2}[model]
    if steps:
        about |= train(model, base, folders[WHOLE], steps)
    else:
        folders[WHOLE].symlink_to(base)
    about |= trim(model, folders[WHOLE], folders[OURS], "validation", "test")
    trim(model, folders[WHOLE], folder / "unseen", "validation")
    figures, scores = [], {}
    for name, its in (*folders.items(), ("trimmed without the test set", folder / "unseen")):
        scores[name] = score(model, its)
        figures.append(
            Figure(f"nearest is right, {name}", 100 * scores[name]["right"] / len(scores[name]["nearest"]), "%")
        )
    pairs = zip(scores[WHOLE]["nearest"], scores[OURS]["nearest"], strict=True)
    away = sum(whole != trimmed for whole, trimmed in pairs)
    figures.append(Figure("premises on covered texts whose nearest is another", away, "", bar=0.0))
    runtimes = ["PyTorch"] + (["onnxruntime"] if installed("onnxruntime") and installed("onnxscript") else [])
    sizes = {"weights": {name: _bytes(its, "*.safetensors") for name, its in folders.items()}}
    sizes["tokenizer.json"] = {name: _bytes(its, "tokenizer.json") for name, its in folders.items()}
    if "onnxruntime" in runtimes:
        sizes["model.onnx"] = {name: export(copied(its)) for name, its in folders.items()}
    series: list[Series] = []
    for what, of_folders in sizes.items():
        series += beside_ours("files", what, "MB", {name: [size / _MB] for name, size in of_folders.items()})
    for runtime in runtimes:
        series += _used(model, runtime, folders, options.rounds or 3, budget)
    title = f"A trimmed model in use: {model}"
    missing = () if len(runtimes) == 2 else ("onnxruntime: open: it or onnxscript is not installed",)
    return Result(
        ABOUT.name, title, model, "cpu", tuple(series), tuple(figures), missing, budget.spent, options.seconds, about
    )


def copied(folder: Path) -> Path:
    """The folder, with links in the place of a linked one: what is exported lies beside, and not in the source."""
    if folder.is_symlink():
        source = folder.resolve()
        folder.unlink()
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).symlink_to(file)
    return folder


def _bytes(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


def _used(model: str, runtime: str, folders: dict[str, Path], rounds: int, budget: Budget) -> list[Series]:
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
    for name in turns(folders, rounds, budget):
        taken[name].append(run_child(MODULE, model, folders[name], runtime))
    series: list[Series] = []
    for what, key, unit, scale in (
        ("load time", "load_seconds", "s", 1.0),
        ("time of one text", "latency_seconds", "ms", 1e-3),
        ("time of a thousand tokens, 16 texts at once", "tokens_per_second", "ms", 0.0),
        ("peak of memory, libraries included", "peak_bytes", "MB", _MB),
    ):
        values = {
            name: [1e6 / each[key] if scale == 0.0 else each[key] / scale for each in its]
            for name, its in taken.items()
        }
        series += beside_ours(what, runtime, unit, values)
    return series


def child(model: str, folder: str, runtime: str) -> dict[str, Any]:
    return use(model, folder, runtime)


def main(arguments: list[str] | None = None) -> list[Result]:
    made = parser(ABOUT)
    made.add_argument("--steps", type=int, default=30, help="training steps of e5-small")
    made.add_argument("--models", nargs="+", choices=("e5-small", "minilm"), default=("e5-small", "minilm"))
    options = read_options(made, arguments)
    return finish(measure(options), options)


if __name__ == "__main__":
    run_module(child, main)
