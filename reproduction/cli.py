"""The commands: one for each table and the figure, and one for all of them."""

import inspect
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leanvocab.cli.printing import AsJson, clean_errors, print_json, print_rich, quiet_libraries

if TYPE_CHECKING:
    from reproduction.bench import Bench
    from reproduction.grid import Result
    from reproduction.paper import Task

HERE = Path(__file__).parent

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Data = Annotated[Path | None, typer.Option(help="Folder with glue/ and xnli/. By default the hub.")]
Tokenizers = Annotated[Path | None, typer.Option(help="Folder of tokenizers and configs by name. By default the hub.")]
Models = Annotated[Path | None, typer.Option(help="Folder of pretrained models by name. By default the hub.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")]
Tasks = Annotated[list[str] | None, typer.Option("--task", help="A task of GLUE; several if given so. By default all.")]
Text = Annotated[str | None, typer.Option(help="Folder of text to read, or - for standard input.")]
Packages = Annotated[bool, typer.Option("--packages", help="Read the text of the installed Python packages.")]
MaxMegabytes = Annotated[float | None, typer.Option(help="Stop reading after so many megabytes.")]
Runs = Annotated[int, typer.Option(min=1, help="Runs, or seeds, of each fine-tuning.")]
MaxSteps = Annotated[int | None, typer.Option(help="Stop each fine-tuning after so many steps. By default none.")]
MaxTrain = Annotated[int | None, typer.Option("--max-train-samples", help="Train on so many examples at most.")]
MaxEval = Annotated[int | None, typer.Option("--max-eval-samples", help="Validate on so many examples at most.")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Train on the CPU, even where there is an accelerator.")]
DEFAULT_OUTPUT = HERE / "results"


def _command(make: "Callable[..., Result]") -> "Callable[..., Result]":
    """Adds a command that makes a result, writes its files and shows it: its own options stand between the shared ones."""
    parameters = inspect.signature(make).parameters
    own = [parameter for name, parameter in parameters.items() if name not in ("bench", "output")]

    def command(
        data: Data, tokenizers: Tokenizers, models: Models, output: Output, as_json: AsJson, **options: Any
    ) -> None:
        with clean_errors(as_json):
            folder = {"output": output} if "output" in parameters else {}
            result = make(_bench(data, tokenizers, models), **folder, **options)
            files = write_result(result, output)
        if as_json:
            print_json({**result.to_dict(), "files": files})
        else:
            show(result)

    options = [*_SHARED, *own, _option("as_json", AsJson, False)]
    command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    command.__annotations__ = {option.name: option.annotation for option in options}
    app.command(make.__name__, help=make.__doc__)(command)
    return make


def _option(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_SHARED = [
    *(_option(name, kind, None) for name, kind in (("data", Data), ("tokenizers", Tokenizers), ("models", Models))),
    _option("output", Output, DEFAULT_OUTPUT),
]


def _bench(data: Path | None, tokenizers: Path | None, models: Path | None) -> "Bench":
    from reproduction.bench import Bench
    from reproduction.sources import Sources

    quiet_libraries()
    return Bench.of(Sources(data, tokenizers, models))


def write_result(result: "Result", folder: Path) -> list[str]:
    """The cells and further records of a result as CSV, named as the published tables; returns the files' names."""
    from reproduction.cells import write_cells, write_records

    paths = write_cells(result.cells, folder)
    for name, records in result.records.items():
        if records:
            paths.append(folder / f"{name}.csv")
            write_records(records, paths[-1])
    return [path.name for path in paths] + list(result.figures)


def show(result: "Result") -> None:
    """The tables of a result on the terminal."""
    from reproduction.cells import tally
    from reproduction.grid import to_rich

    found = tally(result.cells)
    counts = (
        f"{found['cells']} cells: {found['matched']} matched ({found['same_digits']} in every digit), "
        f"{found['differs']} differ, {found['undecided']} undecided"
    )
    print_rich(*map(to_rich, result.grids), *result.notes, *([counts] if found["cells"] else []))


def _tasks(bench: "Bench", names: list[str] | None) -> "tuple[Task, ...]":
    """The tasks of those names; each must be there."""
    from reproduction.paper import TASKS, find_task

    if names is None:
        return TASKS
    tasks = tuple(find_task(name) for name in names)
    for task in tasks:
        bench.sources.require(task)
    return tasks


@_command
def table1(
    bench: "Bench",
    *,
    text: Text = None,
    packages: Packages = False,
    dataset: Annotated[str | None, typer.Option(help="A data set of the hub, streamed. By default Wikipedia.")] = None,
    config_name: Annotated[str | None, typer.Option(help="Its configuration.")] = None,
    split: Annotated[str, typer.Option(help="Its split.")] = "train",
    column: Annotated[str, typer.Option(help="Its column with text.")] = "text",
    tokenizer: Annotated[str, typer.Option(help="Whose tokens.")] = "openai-community/gpt2",
    max_megabytes: MaxMegabytes = None,
) -> "Result":
    """Table 1: tokens that never occur in a corpus."""
    from reproduction import unused

    corpus = unused.open_corpus(text, packages, dataset, config_name, split, column)
    return unused.table1(bench.sources, corpus, tokenizer, max_bytes=_num_bytes(max_megabytes))


def _num_bytes(megabytes: float | None) -> int | None:
    return None if megabytes is None else int(megabytes * 1e6)


def _add_table(module: str, name: str, about: str, *, of_tasks: bool = False) -> None:
    """A command whose result `reproduction.MODULE.NAME` makes of the bench, and of tasks where these can be chosen."""

    def make_of_tasks(bench: "Bench", *, task: Tasks = None) -> "Result":
        return make(bench, _tasks(bench, task))

    def make(bench: "Bench", *arguments: Any) -> "Result":
        result: Result = getattr(import_module(f"reproduction.{module}"), name)(bench, *arguments)
        return result

    chosen = make_of_tasks if of_tasks else lambda bench: make(bench)
    chosen.__name__, chosen.__doc__ = name, about
    _command(chosen)


_add_table("reductions", "table2", "Table 2: reduction of embedding and model parameters across GLUE.", of_tasks=True)
_add_table("reductions", "table3", "Table 3: reduction for each size of DeBERTaV3.", of_tasks=True)
_add_table("reductions", "table4", "Table 4: reduction on subsets of XNLI.")
_add_table("inventory", "table5", "Table 5: sizes of the models.")
_add_table("inventory", "table6", "Table 6: sizes of DeBERTaV3.")
_add_table("inventory", "table7", "Table 7: examples per split of GLUE.", of_tasks=True)
_add_table("inventory", "table8", "Table 8: hyperparameters, beside the library's defaults.")


@_command
def table9(
    bench: "Bench",
    *,
    task: Tasks = None,
    model: Annotated[
        str | None, typer.Option(help="Model to fine-tune. By default RoBERTa, or the first there.")
    ] = None,
    runs: Runs = 5,
    max_steps: MaxSteps = None,
    cpu: Cpu = False,
) -> "Result":
    """Table 9: seconds to count and shrink, beside those to fine-tune."""
    from reproduction import training

    limits = training.Limits(max_steps=max_steps, cpu=cpu)
    return training.table9(bench.sources, model, _chosen(bench, task), runs=runs, limits=limits)


@_command
def table10(
    bench: "Bench",
    *,
    task: Tasks = None,
    model: Annotated[list[str] | None, typer.Option(help="Model to fine-tune; several if given so.")] = None,
    seeds: Runs = 5,
    epochs: Annotated[float, typer.Option(help="Passes over the training split.")] = 3.0,
    max_steps: MaxSteps = None,
    max_train_samples: MaxTrain = None,
    max_eval_samples: MaxEval = None,
    cpu: Cpu = False,
) -> "Result":
    """Table 10: scores without and with a partial vocabulary."""
    from reproduction import training

    limits = training.Limits(max_steps, max_train_samples, max_eval_samples, epochs, cpu)
    return training.table10(bench.sources, model, _chosen(bench, task), seeds=seeds, limits=limits)


def _chosen(bench: "Bench", names: list[str] | None) -> "tuple[Task, ...] | None":
    return None if names is None else _tasks(bench, names)


@_command
def figure2(bench: "Bench", output: Path, *, task: Tasks = None) -> "Result":
    """Figure 2: unique and total tokens of the GLUE data sets, as PNG and SVG."""
    from reproduction import heaps

    return heaps.figure2(bench.sources, output, _tasks(bench, task))


_add_table("evidence", "evidence", "The published numbers against each other, and other ways of counting.")


@app.command(name="all")
def everything(
    data: Data = None,
    tokenizers: Tokenizers = None,
    models: Models = None,
    output: Output = DEFAULT_OUTPUT,
    report: Annotated[Path, typer.Option(help="File of the report.")] = HERE / "REPORT.md",
    text: Text = None,
    packages: Packages = False,
    max_megabytes: MaxMegabytes = None,
    training: Annotated[bool, typer.Option(help="Fine-tune for Tables 9 and 10.")] = True,
    runs: Runs = 5,
    epochs: Annotated[float, typer.Option(help="Passes over the training split (Table 10).")] = 3.0,
    max_steps: Annotated[int | None, typer.Option(help="Steps of each fine-tuning of Table 9 at most.")] = None,
    max_train_samples: MaxTrain = None,
    max_eval_samples: MaxEval = None,
    training_task: Annotated[list[str] | None, typer.Option(help="Tasks of Table 10. By default all complete.")] = None,
    cpu: Cpu = False,
) -> None:
    """All of it, and REPORT.md."""
    start = time.monotonic()
    with clean_errors(False):
        bench = _bench(data, tokenizers, models)
        chosen = _chosen(bench, training_task)
        from reproduction import unused
        from reproduction.grid import to_rich
        from reproduction.report import summary, write_report
        from reproduction.training import Limits, table9, table10

        corpus = unused.open_corpus(text, packages, None, None, "train", "text")
        max_bytes = _num_bytes(max_megabytes)
        steps: list[Callable[[], Result]] = [lambda: unused.table1(bench.sources, corpus, max_bytes=max_bytes)]
        steps += _steps_without_training(bench, output)
        if training:
            short = Limits(max_steps, cpu=cpu)
            small = Limits(None, max_train_samples, max_eval_samples, epochs, cpu)
            steps.append(lambda: table9(bench.sources, runs=runs, limits=short))
            steps.append(lambda: table10(bench.sources, None, chosen, seeds=runs, limits=small))
    results: list[Result] = []
    for make in steps:
        results.append(_step(make, output))
        write_report(results, report, time.monotonic() - start)  # each time: what was found is not lost
    print_rich(to_rich(summary(results)), f"written: {report.name}, and the results beside it")


def _steps_without_training(bench: "Bench", output: Path) -> "list[Callable[[], Result]]":
    from reproduction import evidence, heaps, inventory, reductions

    made = (
        reductions.table2, reductions.table3, reductions.table4,
        inventory.table5, inventory.table6, inventory.table7, inventory.table8,
    )  # fmt: skip
    return [
        *(partial(make, bench) for make in made),
        lambda: heaps.figure2(bench.sources, output),
        lambda: evidence.evidence(bench),
    ]


def _step(make: "Callable[[], Result]", output: Path) -> "Result":
    with clean_errors(False):
        result = make()
        write_result(result, output)
    show(result)
    return result


def main() -> None:
    """Run the command line."""
    app()
