"""Every notebook's cells run from top to bottom, on a small model and a small file in the place of the hub's."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from own_process import run_program
from texts import pairs, rows, save_language_model, save_pretrained, write

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
NEEDED = {"classifier": "datasets", "multilingual_embeddings": "sentence_transformers", "qlora": "bitsandbytes"}


def cells_of(notebook: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(notebook.read_text())["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in cells]


def program(notebook: Path, parameters: dict[str, Any]) -> str:
    """The code of a notebook, with other parameters, and without what installs packages."""
    parts = []
    for cell in cells_of(notebook):
        if cell["cell_type"] == "code" and not cell["source"].startswith("%pip"):
            parts.append(cell["source"])
            if "parameters" in cell["metadata"].get("tags", ()):
                parts += [f"{name} = {value!r}" for name, value in parameters.items()]
    return "\n\n".join(parts) + "\n"


def test_there_is_one_for_each_kind_of_user() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(NEEDED)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(notebook: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec(NEEDED[notebook.stem]) is None:
        pytest.skip(f"needs {NEEDED[notebook.stem]}")
    model, table, output = tmp_path / "model", tmp_path / "data.csv", tmp_path / "output"
    data = {"path": "csv", "data_files": str(table), "split": "train"}
    given = {"MODEL": str(model), "DATA": data, "OUTPUT": str(output), "STEPS": 2}
    if notebook.stem == "qlora":
        save_language_model(model, "llama", tied=True)
        write(table, rows())
        given["TEXT"] = "text"
    elif notebook.stem == "classifier":
        save_pretrained(model)
        write(table, rows())
        given |= {"TEXT": "text", "LABEL": "label"}
    else:
        save_pretrained(model)
        write(table, pairs(48, names=("anchor", "positive")))
        given |= {"ANCHOR": "anchor", "POSITIVE": "positive", "BATCH": 8}
    code = tmp_path / "notebook.py"
    lines = program(notebook, given).replace("\n", "\n    ")
    code.write_text(f"import os\n\nos.chdir({str(tmp_path)!r})\nif __name__ == '__main__':\n    {lines}\n")
    status, printed = run_program(code, [], {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}, None, tmp_path)
    assert status == 0, printed[-3000:]
    assert {path.name for path in output.iterdir()} & {"model.safetensors", "adapter_model.safetensors"}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_what_it_printed(notebook: Path) -> None:
    for cell in cells_of(notebook):
        assert not cell.get("outputs"), cell["source"]
        assert cell.get("execution_count") is None
    tagged = [cell for cell in cells_of(notebook) if "parameters" in cell["metadata"].get("tags", ())]
    assert len(tagged) == 1
