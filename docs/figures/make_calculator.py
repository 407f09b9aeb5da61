"""What the calculator of docs/calculator.md adds up, into docs/assets/calculator/calculator-data.js.

Nothing in it is a formula written by hand: parameters are those that `estimate_memory` counts (`estimated_model`), what each of
them costs is traced from the functions of the estimate, and optimizer states are those of a step on tensors without memory.
"""

import csv
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from docs.figures.traced import Tree, evaluated, traced
from leanvocab.finetune.pretrained import run_arguments
from leanvocab.finetune.settings import FineTuneSettings
from leanvocab.output.frozen_rows import FrozenSizes
from leanvocab.output.loss import peak_bytes
from leanvocab.reports.memory import EstimatedModel, EstimatedTable, estimate_memory, estimated_model
from leanvocab.reports.memory_estimate import (
    CARDS,
    LABELS,
    LITTLE,
    SAVES_LITTLE,
    TAKEN_BYTES,
    Footprint,
    Parameter,
    make_footprint,
    plain_loss_bytes,
    remap_bytes,
)
from leanvocab.reports.state_bytes import OPTIMIZERS, shared_bytes, state_bytes

HERE = Path(__file__).parent
TARGET = HERE.parent / "assets" / "calculator" / "calculator-data.js"
MODELS: Mapping[str, Any] = json.loads((HERE / "model_configs.json").read_text())["models"]
PRECISIONS = ("fp32", "bf16", "mixed")
OUTPUTS = ("full", "frozen", "restricted")
PUBLISHED = HERE.parents[1] / "reproduction" / "published"
MEASURED = HERE.parents[1] / "reproduction" / "results"
TASKS = {
    "cola": "CoLA", "mnli": "MNLI", "mrpc": "MRPC", "qnli": "QNLI", "qqp": "QQP", "rte": "RTE", "sst2": "SST-2", "stsb": "STS-B",
    "wnli": "WNLI", "en": "XNLI, English", "en-de": "XNLI, English and German", "en-zh": "XNLI, English and Chinese",
    "all": "XNLI, all 15 languages",
}  # fmt: skip
_DTYPES = {4: torch.float32, 2: torch.bfloat16}
_KINDS = {"trains": "t", "in_embedding": "e", "in_layer": "l", "is_table": "v"}


# --- models -----------------------------------------------------------------------------------------------------------


def config_of(name: str) -> Any:
    """The transformers config of a model of the list."""
    fields = dict(MODELS[name]["config"])
    return transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)


def estimate_arguments(name: str, method: str, precision: str) -> tuple[Any, dict[str, Any]]:
    """The config and the arguments of `estimate_memory` for a way to train a model: "all" weights, or "qlora"."""
    task = MODELS[name]["task"]
    is_speech = task == "speech"
    settings = FineTuneSettings(
        task="seq2seq-lm" if is_speech else task, qlora=method == "qlora", bf16=precision == "mixed"
    )
    config, arguments = run_arguments(config_of(name), settings)
    if is_speech:
        arguments["auto_class"] = "AutoModelForSpeechSeq2Seq"
    return config, arguments if method == "qlora" else arguments | {"precision": precision}


def precisions_of(method: str) -> tuple[str, ...]:
    """Precisions that a method has; "fp32" says what the weights that are not in 4 bits are in."""
    return PRECISIONS if method == "all" else ("fp32", "mixed")


def outputs_of(name: str) -> tuple[str | None, ...]:
    """Output modes that a model has, its default first; None where it has no output layer."""
    if MODELS[name]["task"] == "classification":
        return (None,)
    config = config_of(name)
    return ("frozen", "restricted") if config.get_text_config().tie_word_embeddings else OUTPUTS


class TypedModel(nn.Module):
    """An encoder or decoder by its sizes: a vocabulary matrix, and other parameters in square matrices of its width.

    What is left over lies in one vector. The output layer of a decoder is the same matrix where it is tied.
    """

    def __init__(self, vocabulary: int, width: int, others: int, kind: str):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(others // width**2))
        rest = others % width**2
        self.rest = nn.Parameter(torch.empty(rest, device=self.embedding.weight.device)) if rest else None
        self.output = None if kind == "encoder" else nn.Linear(width, vocabulary, bias=False)
        if self.output is not None and kind == "tied":
            self.output.weight = self.embedding.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module | None:
        return self.output


TYPED: Mapping[str, tuple[str | None, ...]] = {"encoder": (None,), "tied": OUTPUTS[1:], "untied": OUTPUTS}


def _typed() -> dict[str, Any]:
    """Models whose sizes somebody types: those of one with sizes that are like no other number, which become names."""
    vocabulary, width, matrices, rest = 1009, 13, 5, 11
    names = {vocabulary: "vocabulary", width: "width", rest: "rest"}
    result = {}
    for kind, outputs in TYPED.items():
        groups: list[Any] = []
        modes = {}
        for output in outputs:
            with torch.device("meta"):
                module = TypedModel(vocabulary, width, matrices * width**2 + rest, kind)
            built = {each: estimated_model(module, 7, precision=each, output=output) for each in PRECISIONS}
            modes[str(output)] = _mode(built, groups)
        for mode in modes.values():
            mode["tables"] = [[names[full], names[dim], *others] for full, dim, *others in mode["tables"]]
            mode["losses"] = [[names[rows], table] for rows, table in mode["losses"]]
        for parameters in groups:
            for parameter in parameters:
                parameter[0] = [names[size] for size in parameter[0]]
                parameter[1] = "matrices" if parameter[1] == matrices else parameter[1]
        result[kind] = {"groups": groups, "methods": {"all": modes}}
    return result


def model_data(name: str) -> dict[str, Any]:
    """The parameters of a model, by the way in which it trains and by what becomes of its output layer."""
    groups: list[Any] = []
    methods: dict[str, Any] = {"all": {}, "qlora": {}}
    for (method, modes), output in itertools.product(methods.items(), outputs_of(name)):
        built = {}
        for precision in precisions_of(method):
            config, arguments = estimate_arguments(name, method, precision)
            built[precision] = estimated_model(config, 7, **arguments | {"output": output})
        modes[str(output)] = _mode(built, groups)
    entry = MODELS[name]
    return {"task": entry["task"], "vocabulary": entry["vocabulary"], "groups": groups, "methods": methods}


def _mode(built: Mapping[str, EstimatedModel], groups: list[Any]) -> dict[str, Any]:
    """One way to train: its parameters (an index into `groups`), its tables, and the losses that its output layers have."""
    parameters = _grouped(built)
    if parameters not in groups:
        groups.append(parameters)
    first = next(iter(built.values()))
    tables = []
    for number, table in enumerate(first.tables):
        keys = {precision: _key(model.tables[number], model) for precision, model in built.items()}
        dim = table.weight.shape[1]
        sides = [table.num_inputs, len(table.modules) - table.num_inputs]
        tables.append([table.rows.full_rows, dim, *sides, keys if table.output else None])
    numbers = {id(table.weight): number for number, table in enumerate(first.tables)}
    losses = [[weight.shape[0], table and numbers[id(table.weight)]] for weight, table in first.outputs()]
    found = {"parameters": groups.index(parameters), "tables": tables, "losses": losses}
    return found | {"buffers": first.saved_buffers_bytes}


def _grouped(built: Mapping[str, EstimatedModel]) -> list[list[Any]]:
    """Parameters that are alike, with their number: [shape, number, kind, {precision: bytes of a value}]."""
    alike: Counter[tuple[Any, ...]] = Counter()
    for several in zip(*(model.parameters(kept=False) for model in built.values()), strict=True):
        its = several[0]
        assert all(replace(each, value_bytes=its.value_bytes) == its for each in several)
        kind = "".join(letter for field, letter in _KINDS.items() if getattr(its, field))
        alike[its.shape, kind, tuple(each.value_bytes for each in several)] += 1
    return [
        [list(shape), count, kind, dict(zip(built, value_bytes, strict=True))]
        for (shape, kind, value_bytes), count in alike.items()
    ]


def _key(table: EstimatedTable, model: EstimatedModel) -> str:
    """The kind of an output layer's rows, on which formulas depend."""
    computed = table.computed(model.precision)
    sizes = table.frozen_sizes(model.precision)
    return f"{computed.itemsize}" if sizes is None else f"{sizes.stored.itemsize}/{computed.itemsize}"


# --- what each of them costs ------------------------------------------------------------------------------------------


def _costs() -> dict[str, Any]:
    """Bytes of a parameter of each kind in each part of a footprint, of `values` of so many `bytes` with its `states`."""
    parts = [
        name for name in Footprint.__dataclass_fields__ if name not in ("peak_bytes", "loss_bytes", "buffers_bytes")
    ]
    costs: dict[str, Any] = {"others": dict(_others(parts))}
    for letters in itertools.product(*(("", letter) for letter in _KINDS.values())):
        kinds = {field: letter in letters for field, letter in _KINDS.items()}
        for mixed in (False, True):

            def part_of(values: Any, size: Any, states: Any, part: str, kinds: Any = kinds, mixed: bool = mixed) -> Any:
                parameter = Parameter((values,), size, **kinds)
                footprint = make_footprint([parameter], {parameter: states}, mixed, 0)
                return getattr(footprint, part)

            trees = {
                part: traced(lambda *of, part=part: part_of(*of, part=part), "values", "bytes", "states")
                for part in parts
            }
            costs["".join(letters) + ("+" if mixed else "")] = {part: tree for part, tree in trees.items() if tree != 0}
    return costs


def _others(parts: list[str]) -> Iterator[tuple[str, Tree]]:
    """Bytes in each part of a footprint that belong to no parameter."""
    names = ("buffers", "remap", "frozen", "loss")

    def part_of(part: str, shared: Any, *its: Any) -> Any:
        others = {f"{name}_bytes": value for name, value in zip(names, its, strict=True)}
        return getattr(make_footprint([], {}, False, shared, **others), part)

    for part in (*parts, "buffers_bytes", "loss_bytes"):
        tree = traced(lambda *of, part=part: part_of(part, *of), "shared", *names)
        if tree != 0:
            yield part, tree


def _rows() -> dict[str, Any]:
    """Formulas of the map of ids, of frozen rows, and of losses, by what `_key` says and where frozen rows are."""
    frozen, losses = {}, {}
    for computed in _DTYPES.values():
        losses[f"{computed.itemsize}"] = traced(
            lambda tokens, kept, dim, computed=computed: peak_bytes(tokens, kept, dim, computed, None),
            "tokens", "kept", "dim",
        )  # fmt: skip
    for stored, computed, where in itertools.product(_DTYPES.values(), _DTYPES.values(), ("device", "host")):

        def sizes(full: Any, kept: Any, dim: Any, kind: Any = (stored, computed, where == "host")) -> FrozenSizes:
            return FrozenSizes(full, kept, dim, *kind)

        key = f"{stored.itemsize}/{computed.itemsize}/{where}"
        frozen[key] = traced(lambda *of, sizes=sizes: sizes(*of).held_bytes, "full", "kept", "dim")
        losses[key] = traced(
            lambda tokens, full, kept, dim, sizes=sizes, computed=computed: peak_bytes(
                tokens, kept, dim, computed, sizes(full, kept, dim)
            ),
            "tokens", "full", "kept", "dim",
        )  # fmt: skip
    remap = traced(remap_bytes, "full", "kept", "inputs", "outputs")
    return {
        "remap": remap,
        "frozen": frozen,
        "losses": losses,
        "plain_loss": traced(plain_loss_bytes, "tokens", "full"),
    }


def _states(optimizer: str) -> dict[str, Any]:
    """Formulas of an optimizer's states, of a parameter that has `values`, so many rows `per_last` and columns `per_second`."""
    if optimizer == "adamw_8bit":
        return dict(_eight_bit_states())
    return {
        f"{value_bytes}/{'matrix' if is_matrix else 'vector'}/{in_embedding}": _law(optimizer, value_bytes, is_matrix)
        for value_bytes, is_matrix, in_embedding in itertools.product(_DTYPES, (True, False), ("e", ""))
    }


def _eight_bit_states() -> Iterator[tuple[str, Tree]]:
    for value_bytes, form, in_embedding in itertools.product(_DTYPES, ("matrix", "vector"), ("e", "")):

        def states(values: Any, kind: Any = (value_bytes, True, bool(in_embedding), False, False)) -> Any:
            (held,) = state_bytes("adamw_8bit", [Parameter((values,), *kind)]).values()
            return held

        yield f"{value_bytes}/{form}/{in_embedding}", traced(states, "values")


_FEATURES = {True: ("values", "per_last", "per_second"), False: ("values",)}


def _law(optimizer: str, value_bytes: int, is_matrix: bool) -> Tree:
    """States as a sum of numbers of values, rows and columns: solved for some shapes, and checked with others."""
    shapes: list[tuple[int, ...]] = [(3,), (17,), (1000,), (4097,)]
    if is_matrix:
        shapes = [(2, 3), (5, 2), (7, 11), (64, 3), (1000, 96), (6, 5, 3), (80, 7, 4)]
    parameters = [Parameter(shape, value_bytes, True, False, False, False) for shape in shapes]
    held = state_bytes(optimizer, parameters)
    features = [[features_of(shape)[name] for name in _FEATURES[is_matrix]] + [1] for shape in shapes]
    known = [held[parameter] for parameter in parameters]
    weights = (
        np.linalg.lstsq(np.array(features[:5], float), np.array(known[:5], float), rcond=None)[0].round().astype(int)
    )
    tree: Tree = int(weights[-1])
    for weight, name in zip(weights.tolist(), _FEATURES[is_matrix], strict=False):
        tree = ["+", ["*", weight, name], tree] if weight else tree
    for shape, its in zip(shapes, known, strict=True):
        if evaluated(tree, **features_of(shape)) != its:
            raise ValueError(f"{optimizer}'s states of {shape} are {its} bytes, which is no sum of its sizes: {tree}")
    return tree


def features_of(shape: tuple[int, ...]) -> dict[str, int]:
    """Numbers of a shape on which states depend."""
    values = int(np.prod(shape))
    per_second = values // shape[-2] if len(shape) > 1 else 0
    return {"values": values, "per_last": values // shape[-1], "per_second": per_second}


def _shared(optimizer: str) -> dict[str, Tree]:
    """What a parameter adds to states that all share: the most that any of them adds is there once."""

    def shared(values: Any, in_embedding: str) -> Any:
        return shared_bytes(optimizer, [Parameter((values,), 4, True, bool(in_embedding), False, False)])

    return {kind: traced(lambda values, kind=kind: shared(values, kind), "values") for kind in ("e", "")}


# --- rows that the paper's tasks use ----------------------------------------------------------------------------------


def _tasks() -> dict[str, dict[str, Any]]:
    """Rows kept by vocabulary and task: counted where the data were at hand whole, or else by the paper's percentage."""
    with (PUBLISHED / "table5_model_sizes.csv").open() as file:
        sizes = {row["model"]: int(row["vocabulary_size"]) for row in csv.DictReader(file)}
    sizes["BERT"] = (
        30_522  # the table prints bert-base-cased's; its reductions are of the uncased one, as counting them said
    )
    tasks: dict[str, dict[str, Any]] = {}
    for table in ("table2_embedding_reduction_percent", "table4_xnli_embedding_reduction_percent"):
        with (MEASURED / f"{table}.csv").open() as file:
            for row in csv.DictReader(file):
                if row["row"] not in sizes or row["variant"] or row["column"] == "mean":
                    continue
                is_counted = row["status"] == "matched" and row["with_special"]
                percent = float(row["with_special"] if is_counted else row["published"])
                rows = sizes[row["row"]] * (100 - percent) / 100
                name = TASKS[row["column"]]
                tasks.setdefault(row["row"], {})[name] = [
                    round(rows) if is_counted else round(rows, -2),
                    bool(is_counted),
                ]
    return {name: its for name, its in tasks.items() if name in {entry["vocabulary"] for entry in MODELS.values()}}


def _notes() -> list[str]:
    """Sentences below every estimate, and below one whose output layer is partial."""
    with torch.device("meta"):
        module = TypedModel(100, 8, 0, "tied")
    return list(estimate_memory(module, 50, output="restricted").notes)


# --- the file ---------------------------------------------------------------------------------------------------------


def data() -> dict[str, Any]:
    """Everything that the page adds up."""
    return {
        "models": {name: model_data(name) for name in MODELS},
        **formulas(),
    }


def formulas() -> dict[str, Any]:
    """All of it that is of no model of the list."""
    return {
        "typed": _typed(),
        "tasks": _tasks(),
        "precisions": PRECISIONS,
        "optimizers": {name: {"states": _states(name), "shared": _shared(name)} for name in OPTIMIZERS},
        "costs": _costs(),
        **_rows(),
        "parts": LABELS,
        "cards": {size: (size << 30) - TAKEN_BYTES for size in CARDS},
        "little": LITTLE,
        "saves_little": SAVES_LITTLE,
        "notes": _notes(),
    }


def written() -> str:
    """The file's text: one model a line. A script, since a page that lies in a folder may not fetch."""
    lines = []
    for name, value in data().items():
        if name in ("models", "typed", "optimizers", "losses", "costs"):
            entries = ",\n".join(f"{json.dumps(key)}:{_compact(its)}" for key, its in value.items())
            lines.append(f"{json.dumps(name)}:{{\n{entries}\n}}")
        else:
            lines.append(f"{json.dumps(name)}:{_compact(value)}")
    body = ",\n".join(lines)
    return (
        "// Made by docs/figures/make_calculator.py: `make figures`.\n"
        f"var leanvocabData = {{\n{body}\n}};\n"
        'if (typeof module !== "undefined") module.exports = leanvocabData;\n'
    )


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def main() -> None:
    """Writes the file."""
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(written())
    print(TARGET)


if __name__ == "__main__":
    main()
