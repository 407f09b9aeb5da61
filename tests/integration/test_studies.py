"""A study runs on a tiny model from end to end, and its page says what its results say."""

import csv
import json
import math

import pytest
import torch
from models import FULL_SIZE
from texts import ids_of, language_model

import leanvocab as lv
from studies.output_modes import command, grid, measures, tables
from studies.output_modes.files import Results


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A results folder of the study in its quick size: one learning rate, two seeds."""
    folder = tmp_path_factory.mktemp("study")
    command.main(["--quick", "--output", str(folder), "--learning-rates", "0.01", "--seeds", "0", "1"])
    return folder


def test_the_study_runs_every_cell_of_its_grid_and_leaves_these_files(quick):
    wanted = [cell.name for cell in grid.cells([0.01], [0, 1])]
    assert len(wanted) == len(set(wanted)) == 10
    assert sorted(path.stem for path in (quick / "runs").iterdir()) == sorted(wanted)
    assert sorted(path.name for path in quick.iterdir() if path.is_file()) == [
        *("about.json", "generations.csv", "held_out.csv"),
        *("outside_mass.png", "outside_mass.svg", "perplexity.png", "perplexity.svg", "runs.csv"),
    ]


def test_every_run_is_in_the_csv_files_with_what_it_is_measured_against(quick):
    runs = read_csv(quick / "runs.csv")
    assert [(row["mode"], row["seed"], row["vocabulary"]) for row in runs if row["mode"] in ("base", "frozen")] == [
        *(("base", seed, which) for seed in "01" for which in ("trained", "dataset")),
        *(("frozen", "0", "dataset"), ("frozen", "0", "trained"), ("frozen", "1", "trained")),
    ]
    assert len(read_csv(quick / "held_out.csv")) == 2 * len(runs)  # two texts
    assert len(read_csv(quick / "generations.csv")) == 2 * len(runs)  # two prompts


def test_rows_outside_the_vocabulary_stay_unless_the_whole_matrix_is_trained(quick):
    moved = {row["mode"]: [] for row in read_csv(quick / "runs.csv")}
    for row in read_csv(quick / "runs.csv"):
        moved[row["mode"]].append((float(row["kept_drift_ratio"]), float(row["outside_drift_ratio"])))
    assert all(kept > 0 and outside > 0 for kept, outside in moved["full"])
    for mode in ("frozen", "restricted"):
        assert all(kept > 0 and outside == 0 for kept, outside in moved[mode])


def test_runs_that_are_there_are_not_run_again(quick, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("ran again")

    monkeypatch.setattr("studies.output_modes.runs.run", refuse)
    before = (quick / "held_out.csv").read_bytes()
    command.main(["--quick", "--output", str(quick), "--learning-rates", "0.01", "--seeds", "0", "1"])
    assert (quick / "held_out.csv").read_bytes() == before


def test_runs_of_another_size_are_not_mixed_in(quick):
    about = json.loads((quick / "about.json").read_text())
    about["settings"]["num_steps"] = 7
    with pytest.raises(ValueError, match=r"holds runs with settings .*'num_steps': 3.* name another folder"):
        Results(quick).begin(about)


def naive_measures(model, row, kept):
    """One row of token ids, position by position."""
    found = {"all": [], "inside": [], "outside": [], "restricted": [], "mass": [], "top": []}
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row])).logits[0].double()
    for scores, label in zip(logits, row[1:], strict=False):
        probabilities = [float(each) for each in scores.softmax(0)]
        kept_total = sum(probabilities[token_id] for token_id in kept)
        found["all"].append(-math.log(probabilities[label]))
        found["inside" if label in kept else "outside"].append(-math.log(probabilities[label]))
        if label in kept:
            found["restricted"].append(-math.log(probabilities[label] / kept_total))
        found["mass"].append(1 - kept_total)
        found["top"].append(probabilities.index(max(probabilities)) not in kept)
    return {name: sum(values) / len(values) for name, values in found.items()}


def test_measures_are_those_of_the_plain_definitions():
    model = language_model("llama", tied=True)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)  # so that some tokens are more probable than others
    row = ids_of("word3 word7 word100 word3 word5 word101 word7")
    kept = ids_of("word3 word5 word7 word9")
    found = measures.evaluate(
        model, torch.tensor([row]), {"kept": lv.PartialVocabulary(kept, FULL_SIZE)}, batch_size=1
    )["kept"]
    naive = naive_measures(model, row, set(kept))
    assert found["num_labels"] == 6
    assert found["outside_label_ratio"] == pytest.approx(2 / 6)
    assert math.log(found["perplexity"]) == pytest.approx(naive["all"], rel=1e-4)
    for name in ("inside", "outside", "restricted"):
        assert math.log(found[f"{name}_perplexity"]) == pytest.approx(naive[name], rel=1e-4)
    assert found["outside_mass"] == pytest.approx(naive["mass"], rel=1e-4)
    assert found["outside_top_ratio"] == pytest.approx(naive["top"])


def test_a_model_that_did_not_move_has_no_drift():
    model = language_model("llama", tied=True)
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    vocabularies = {"kept": lv.PartialVocabulary([0, 5, 9], FULL_SIZE)}
    found = measures.drift(model, base, vocabularies)["kept"]
    moved = {name: value for name, value in found.items() if name.endswith("drift_ratio")}
    assert set(moved.values()) == {0.0}
    with torch.no_grad():
        model.get_output_embeddings().weight[5] += 1.0
    found = measures.drift(model, base, vocabularies)["kept"]
    kept = base["model.embed_tokens.weight"][[0, 5, 9]]
    dim = kept.shape[1]
    assert found["kept_drift_ratio"] == pytest.approx(math.sqrt(dim) / float(kept.norm()))
    assert (found["outside_drift_ratio"], found["body_drift_ratio"]) == (0.0, 0.0)


def test_the_tables_of_the_page_are_those_of_the_results(repository, tmp_path):
    page = repository / "docs" / "output.md"
    again = tmp_path / "output.md"
    again.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    tables.fill(again, Results(command.RESULTS))
    assert "<!-- begin " in page.read_text(encoding="utf-8")
    assert again.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")


def test_a_table_of_other_results_would_not_be_the_same(quick, repository, tmp_path):
    again = tmp_path / "output.md"
    again.write_text((repository / "docs" / "output.md").read_text(encoding="utf-8"), encoding="utf-8")
    tables.fill(again, Results(quick))
    assert again.read_text(encoding="utf-8") != (repository / "docs" / "output.md").read_text(encoding="utf-8")


def test_the_csv_files_are_those_of_the_runs(tmp_path):
    copy = Results(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in (command.RESULTS / "runs").glob("*.json"):
        (tmp_path / "runs" / path.name).write_bytes(path.read_bytes())
    copy.write_csv()
    for name in ("held_out.csv", "runs.csv", "generations.csv"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (command.RESULTS / name).read_text(encoding="utf-8")
