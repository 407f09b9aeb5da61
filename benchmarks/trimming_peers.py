"""Trimming a vocabulary beside what people use for it: which tokenizers and models each can, whether it is right, time, memory.

Every program gets the same folder and the same texts, counts them itself, and writes a folder, in a process of its own with the
libraries that it asks for (vocabtrimmer: transformers 4; trimbed: Python 3.12 or 3.13, transformers 5.14). Ids that occur are
kept (vocabtrimmer's default drops what occurs once: it is told not to); prunetokens takes no texts and keeps Latin. No program
proves its result here. The results are loaded by plain `from_pretrained` and compared
with the whole model's on the same texts: the share of texts that give the same tokens, and of those the share whose hidden
states are the same bits. Tokenizers are real where the data beside the project holds them, before a small random model of their
family; weights are real where `.cache/models` has them. Peers are looked for in `.cache/trimming-peers/NAME`, an environment or
a folder of packages, which `make peers` makes, and are open where they are not there.
"""

import argparse
import importlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._command import PEERS, About, finish, parser, read_options
from benchmarks._results import OURS, Figure, Result, Series, beside_ours
from benchmarks._rounds import Budget, peak_resident_bytes, run_child, run_module
from benchmarks.trimming_use import make_base as make_model_of_words

ABOUT = About(
    name="trimming_peers",
    measures="Trimming a model and its tokenizer: what can be trimmed, how many texts keep their tokens, time, memory.",
    beside="vocabtrimmer 0.0.2, trimbed 0.0.4, prunetokens 0.1.4",
    limit="right wherever a peer is",
    budget_seconds=900,
)
MODULE = "benchmarks.trimming_peers"
VOCABTRIMMER, TRIMBED, PRUNETOKENS = "vocabtrimmer", "trimbed", "prunetokens"
PROGRAMS = (OURS, VOCABTRIMMER, TRIMBED, PRUNETOKENS)
FOLDERS = PEERS.parent / "trimming-peers"
MODELS = PEERS.parent / "models"
SHARED = Path(os.environ.get("LEANVOCAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
_SMALL = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "num_key_value_heads": 2,
    "head_dim": 16, "d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "n_embd": 32,
    "n_layer": 1, "n_head": 2, "dim": 32, "hidden_dim": 32, "n_layers": 1, "n_heads": 2,
}  # fmt: skip
_LEARNED = ("MaskedLM", "CausalLM", "Seq2SeqLM")


@dataclass(frozen=True)
class Case:
    """A folder of the model and tokenizer `source`, or of a tokenizer with a small model of random weights, and its texts."""

    name: str
    languages: tuple[str, ...]
    head: str | None = None  # the head that it gets; None: as it lies there

    @property
    def source(self) -> Path:
        return MODELS / self.name if self.is_real else SHARED / "tokenizers" / self.name

    @property
    def is_real(self) -> bool:
        return self.name in ("e5-small", "minilm", "smollm2")

    @property
    def title(self) -> str:
        return f"{self.name}, {self.head}" if self.head else self.name


CASES = (
    Case("e5-small", ("en", "de")),
    Case("e5-small", ("en", "de"), "SequenceClassification"),
    Case("minilm", ("en",)),
    Case("smollm2", ("en",)),
    Case("xlm-roberta-base", ("en", "de"), "MaskedLM"),
    Case("bert-base-cased", ("en",), "MaskedLM"),
    Case("bert-base-multilingual-cased", ("en", "de"), "MaskedLM"),
    Case("roberta-base", ("en",), "MaskedLM"),
    Case("deberta-v3-base", ("en",), "MaskedLM"),
    Case("gpt2", ("en",), "CausalLM"),
    Case("llama3", ("en",), "CausalLM"),
    Case("qwen3", ("en",), "CausalLM"),
    Case("t5-small", ("en",), "Seq2SeqLM"),
)


MADE = Case("made", ())  # a small tokenizer of words and a small model, for the small size


def make_texts(case: Case, most: int) -> list[str]:
    """Premises and hypotheses of XNLI's validation set, most a language."""
    if case is MADE:
        return [f"word{number} word{number % 7}" for number in range(most)]
    import pyarrow.parquet

    texts: list[str] = []
    for language in case.languages:
        table = pyarrow.parquet.read_table(SHARED / "xnli" / f"xnli.{language}.validation.parquet")
        both = [text for pair in zip(table["premise"], table["hypothesis"], strict=True) for text in pair]
        texts += [text.as_py() for text in both[:most]]
    return texts


def make_base(case: Case, into: Path) -> None:
    """A folder as it is published: the real one, with a head where it is given one; or a small model of the config's family."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    if case is MADE:
        make_model_of_words(into)
        return
    shutil.copytree(case.source, into, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(case.source)
    if not (into / "tokenizer.json").exists():  # as nearly every published folder has it; prunetokens asks for it
        tokenizer.backend_tokenizer.save(str(into / "tokenizer.json"))
    if case.head:
        torch.manual_seed(0)
        auto = getattr(transformers, f"AutoModelFor{case.head}")
        if case.is_real:
            model = auto.from_pretrained(case.source)
        else:
            known = AutoConfig.from_pretrained(case.source).to_dict()
            small = {name: value for name, value in _SMALL.items() if name in known}
            if known.get("layer_types"):
                small["layer_types"] = known["layer_types"][:1]
            model = auto.from_config(AutoConfig.from_pretrained(case.source, **small))
        model.save_pretrained(into)


# --------------------------------------------------------------------------------------------------------- the programs


def _ours(base: Path, texts: list[str], output: Path) -> Callable[[], None]:
    from transformers import AutoConfig, AutoTokenizer

    import leanvocab
    from leanvocab.trimming.export import export_trimmed

    def trim() -> None:
        tokenizer, config = AutoTokenizer.from_pretrained(base), AutoConfig.from_pretrained(base)
        counts = leanvocab.count_tokens(texts, tokenizer=tokenizer, progress=False)
        vocabulary = leanvocab.PartialVocabulary.from_counts(counts, tokenizer=tokenizer, model=config)
        export_trimmed(base, vocabulary, output, progress=False)

    return trim


def _vocabtrimmer(base: Path, texts: list[str], output: Path) -> Callable[[], None]:
    import vocabtrimmer

    data = output.parent / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    caches = {
        "cache_file_vocab": str(data.parent / "vocab.json"),
        "cache_file_frequency": str(data.parent / "counts.json"),
    }

    def trim() -> None:
        vocabtrimmer.VocabTrimmer(str(base)).trim_vocab(
            "any", str(output), dataset=str(data), dataset_split="train", min_frequency=1, chunk=1000, **caches
        )

    return trim


def _trimbed(base: Path, texts: list[str], output: Path) -> Callable[[], None]:
    trimbed: Any = importlib.import_module("trimbed")
    file = output.with_name("texts.jsonl")
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    corpus = {"datasets": [{"path": "json", "data_files": str(file)}]}

    def trim() -> None:
        config = {"model": str(base), "output_dir": str(output), "verify": False, "verify_model": False}
        chosen = {"corpus": corpus, "selection": {"min_count": 1}}
        trimbed.TrimPipeline(trimbed.TrimConfig.model_validate(config | chosen)).run()

    return trim


def _prunetokens(base: Path, texts: list[str], output: Path) -> Callable[[], None]:
    module: Any = importlib.import_module("prunetokens")

    def trim() -> None:
        module.argv[:] = ["prunetokens", str(base)]
        module.main()  # writes beside the base
        base.with_name(f"{base.name}_pruned").rename(output)

    return trim


def trim_with(program: str, base: str, texts: str, output: str) -> dict[str, Any]:
    """One program's run: seconds and bytes, or what it said where it refused or broke."""
    programs = {OURS: _ours, VOCABTRIMMER: _vocabtrimmer, TRIMBED: _trimbed, PRUNETOKENS: _prunetokens}
    try:
        work = programs[program](Path(base), json.loads(Path(texts).read_text()), Path(output))
        import_model_code(Path(base))
        start = time.perf_counter()
        work()
    except Exception as error:  # of a peer's code, of any kind
        return {"said": said_of(error)}
    return {
        "seconds": time.perf_counter() - start,
        "peak_bytes": peak_resident_bytes(),
        "folder_bytes": sum(path.stat().st_size for path in Path(output).rglob("*") if path.is_file()),
    }


def import_model_code(base: Path) -> None:
    """Imports what each program would import in its own time: the model's class, and the tokenizers'."""
    import transformers

    for architecture in transformers.AutoConfig.from_pretrained(base).architectures:
        getattr(transformers, architecture)
    transformers.AutoTokenizer.from_pretrained(base)


def said_of(error: Exception) -> str:
    """The first line of an error, without this machine's folders."""
    line = (str(error).strip().splitlines() or [""])[0]
    return re.sub(r"(/[\w.+-]+)+/", "…/", f"{type(error).__name__}: {line}")[:200]


# ------------------------------------------------------------------------------------------------------------ the check


def check(base: Path, output: Path, written: list[str], num_models: int = 32) -> dict[str, Any]:
    """What plain `from_pretrained` makes of a trimmed folder, beside the whole one."""
    from transformers import AutoTokenizer

    try:
        whole, trimmed = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(output)
        before, after = whole(written)["input_ids"], trimmed(written)["input_ids"]
        same = [
            whole.convert_ids_to_tokens(old) == trimmed.convert_ids_to_tokens(new)
            for old, new in zip(before, after, strict=True)
        ]
    except Exception as error:
        return {"said": f"its tokenizer does not load: {said_of(error)}"}
    alike = [(old, new) for old, new, is_same in zip(before, after, same, strict=True) if is_same]
    outcome: dict[str, Any] = {"same_texts": sum(same), "texts": len(same), "rows": len(trimmed)}
    try:
        return outcome | _compare_models(base, output, alike[:num_models])
    except Exception as error:
        return outcome | {"said": f"its model does not load: {said_of(error)}"}


def _compare_models(base: Path, output: Path, pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, Any]:
    import torch
    import transformers

    architecture = transformers.AutoConfig.from_pretrained(base).architectures[0]
    whole, trimmed = (
        getattr(transformers, architecture).from_pretrained(folder, dtype="auto").eval() for folder in (base, output)
    )
    num_same, largest = 0, 0.0
    for old, new in pairs:
        states = []
        for model, ids in ((whole, old), (trimmed, new)):
            given = {"input_ids": torch.tensor([ids[:128]])}
            if model.config.is_encoder_decoder:
                given["decoder_input_ids"] = given["input_ids"]
            with torch.inference_mode():
                out = model(**given, output_hidden_states=True)
            states.append((out.get("decoder_hidden_states") or out["hidden_states"])[-1])
        num_same += torch.equal(*states)
        largest = max(largest, float((states[0] - states[1]).abs().max()))
    return {"same_bits": num_same, "compared": len(pairs), "largest_difference": largest}


def outcome_of(trimmed: dict[str, Any], checked: dict[str, Any] | None) -> str:
    """One cell of the table: what came of one program in one case."""
    if checked is None:
        return f"refused, or broke ({trimmed['said']})"
    if "same_texts" not in checked:
        return f"broken: {checked['said']}"
    tokens = f"{100 * checked['same_texts'] / checked['texts']:.4g} % of the texts"
    if "compared" not in checked:
        return f"{tokens}; {checked['said']}"
    if not checked["compared"]:
        return tokens
    states = (
        "same bits"
        if checked["same_bits"] == checked["compared"]
        else f"other values in {checked['compared'] - checked['same_bits']} of {checked['compared']}"
    )
    return f"{tokens}; {states}"


def is_right(checked: dict[str, Any] | None) -> bool:
    """Every text has its tokens, and every text that was compared its bits."""
    if checked is None or "compared" not in checked:
        return False
    return checked["same_texts"] == checked["texts"] and checked["same_bits"] == checked["compared"]


def measure(options: argparse.Namespace) -> Iterator[Result]:
    budget = Budget(options.seconds)
    small = options.size == "small"
    there = [OURS, *(name for name in PROGRAMS[1:] if (FOLDERS / name).is_dir() and not options.no_peers)]
    missing = tuple(f"{name}: open: not here" for name in PROGRAMS[1:] if name not in there)
    titles = options.cases or [case.title for case in CASES]
    chosen = sorted((case for case in CASES if case.title in titles), key=lambda case: titles.index(case.title))
    for case in [MADE] if small else chosen:
        if budget.left == 0 or not (case.source.is_dir() or case is MADE):
            why = f"{case.title}: open: " + ("no time left" if budget.left == 0 else f"no {case.name} here")
            yield Result(ABOUT.name, f"Trimming {case.title}", case.title, "cpu", open=(why,))
            continue
        start = budget.spent
        with tempfile.TemporaryDirectory() as folder:
            results = run_case(case, there, Path(folder), 20 if small else options.texts)
        yield result_of(case, results, missing, budget.spent - start)


def result_of(
    case: Case,
    results: dict[str, tuple[dict[str, Any], dict[str, Any] | None]],
    missing: tuple[str, ...],
    seconds: float,
) -> Result:
    """One case: times and memory of those that wrote a folder, how much of it is right, and what the others said."""
    series: list[Series] = []
    for what, unit, key, scale in (("time", "s", "seconds", 1.0), ("peak of memory", "MB", "peak_bytes", 1e6)):
        values = {name: [trimmed[key] / scale] for name, (trimmed, _) in results.items() if key in trimmed}
        series += beside_ours(what, case.title, unit, values)
    right = [name for name, (_, checked) in results.items() if is_right(checked)]
    beaten = float(bool(right) and OURS not in right)
    figures = [Figure(f"right in all, {name}", float(name in right), "(1: yes)") for name in results]
    figures.append(Figure("a peer is right and leanvocab is not", beaten, "(1: yes)", bar=0.0))
    outcomes = {name: outcome_of(*result) for name, result in results.items()}
    details = {
        "outcomes": outcomes,
        "rows": {name: checked.get("rows") for name, (_, checked) in results.items() if checked},
    }
    title = f"Trimming {case.title}"
    return Result(
        ABOUT.name, title, case.title, "cpu", tuple(series), tuple(figures), missing, seconds, details=details
    )


def run_case(
    case: Case, programs: Sequence[str], folder: Path, num_texts: int
) -> dict[str, tuple[dict[str, Any], dict[str, Any] | None]]:
    """Each program's run and what was found of it; a base of its own each, since one writes beside it."""
    texts, written = folder / "texts.json", make_texts(case, num_texts)
    texts.write_text(json.dumps(written))
    make_base(case, folder / "base")
    results = {}
    for name in programs:
        own = folder / name
        shutil.copytree(folder / "base", own / "base")
        words = (MODULE, name, own / "base", texts, own / "out")
        trimmed = run_child(*words, **_surroundings(name))
        checked = None if "said" in trimmed else check(folder / "base", own / "out", written)
        results[name] = (trimmed, checked)
    return results


def _surroundings(program: str) -> dict[str, Any]:
    """The interpreter and variables of a program: of its own environment, or ours with its folder of packages before all."""
    own = FOLDERS / program / "bin" / "python"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if own.exists():
        return {"python": str(own), "environment": offline | {"PYTHONPATH": str(Path(__file__).parents[1])}}
    return {"environment": offline | {"PYTHONPATH": os.pathsep.join([str(FOLDERS / program), *sys.path])}}


def child(program: str, *words: str) -> dict[str, Any]:
    return trim_with(program, *words)


def main(arguments: list[str] | None = None) -> list[Result]:
    made = parser(ABOUT)
    made.add_argument("--texts", type=int, default=1000, help="texts of each language")
    made.add_argument("--cases", nargs="+", choices=[case.title for case in CASES], help="some cases alone")
    options = read_options(made, arguments)
    return finish(measure(options), options)


if __name__ == "__main__":
    run_module(child, main)
