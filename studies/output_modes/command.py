"""The command line."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from reproduction.machine import machine
from studies.output_modes.files import Results
from studies.output_modes.grid import Settings, cells
from studies.output_modes.pretrained import Pretrained, real_model, tiny_model
from studies.output_modes.texts import Texts, made_up_texts, real_texts

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
RESULTS = Path(__file__).parent / "results"
QUICK = Settings(num_steps=3, batch_size=2, length=16, num_held_out=4, num_new_tokens=4)


def parser() -> argparse.ArgumentParser:
    usual = Settings()
    made = argparse.ArgumentParser(prog="python -m studies.output_modes", description=__doc__)
    made.add_argument("--model", default=HUB_MODEL, help=f"name on the hub, or a folder ({HUB_MODEL})")
    made.add_argument("--data", type=Path, help="folder with glue/ and xnli/; by default the hub")
    made.add_argument(
        "--output", type=Path, default=RESULTS, help="folder for the results; runs that it holds are kept"
    )
    made.add_argument("--learning-rates", type=float, nargs="+", default=[1e-4, 5e-4, 1e-5])
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="all but the first: one learning rate")
    made.add_argument("--steps", type=int, default=usual.num_steps)
    made.add_argument("--quick", action="store_true", help="a tiny model and three steps, to see it work")
    made.add_argument("--page", type=Path, help="write the tables into this page (docs/output.md), between its marks")
    made.add_argument("--show", action="store_true", help="run nothing: draw the plots and make the tables again")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is not there yet; every run is written when it is done."""
    options = parser().parse_args(arguments)
    results = Results(options.output)
    if not options.show:
        settings = QUICK if options.quick else Settings(num_steps=options.steps)
        texts = made_up_texts() if options.quick else real_texts(options.data)
        pretrained = tiny_model(texts) if options.quick else real_model(options.model)
        results.begin({"model": pretrained.name, "settings": asdict(settings), "machine": machine()})
        run_all(results, pretrained, texts, settings, options)
    from studies.output_modes.plots import draw
    from studies.output_modes.tables import fill, tables

    results.write_csv()
    draw(results)
    for name, table in tables(results).items():
        print(f"\n{name}\n\n{table}")
    if options.page is not None:
        fill(options.page, results)


def run_all(
    results: Results, pretrained: Pretrained, texts: Texts, settings: Settings, options: argparse.Namespace
) -> None:
    """Each run of the grid that the results lack."""
    from studies.output_modes.runs import run

    wanted = list(cells(options.learning_rates, options.seeds))
    for number, cell in enumerate(wanted, start=1):
        if results.has(cell):
            continue
        start = time.perf_counter()
        results.add(cell, run(cell, pretrained, texts, settings))
        print(f"{number}/{len(wanted)} {cell.name}: {time.perf_counter() - start:.0f} s", flush=True)
