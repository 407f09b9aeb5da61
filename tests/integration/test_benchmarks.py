"""A small size of each benchmark runs and prints its figures; how fast it was is nobody's test."""

import argparse
import contextlib
import gc
import importlib
import json
import math
import re

import accelerator
import pytest
import torch

from benchmarks import _report, epoch, fits, output_side, training_step
from benchmarks.__main__ import LONG_ON_A_CPU, NAMES, abouts, main
from benchmarks._models import SHAPES, kept_ids, make_model
from benchmarks._results import FOLDER, OURS, Figure, Result, Series, beside_ours, median_interval
from benchmarks._rounds import Budget, take_turns
from benchmarks._summary import render_summary
from benchmarks._tables import compared, quantity, where_a_peer_is_better


class LocalWorker:
    """A worker in this process instead of one of its own."""

    def __init__(self, module, *words):
        self.questions, self.ready = importlib.import_module(module).prepare(*map(str, words))

    def ask(self, question):
        return json.loads(json.dumps(self.questions[question]()))


@contextlib.contextmanager
def local_worker(module, *words):
    yield LocalWorker(module, *words)


def run_here(module, *words, environment=None):
    return json.loads(json.dumps(importlib.import_module(module).child(*map(str, words))))


def check_small_size(name, capsys):
    words = ["--size", "small", "--rounds", "1", "--json", "--no-peers"]
    results = importlib.import_module(f"benchmarks.{name}").main(words)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [each["benchmark"] for each in printed] == [name] * len(results)
    for result, found in zip(results, printed, strict=True):
        assert [each["what"] for each in found["figures"]] == [each.what for each in result.figures]
        assert found["machine"]["torch"]
        assert result.series or result.open
        # Memory that a process takes for the first time may be given back by what this one did before.
        assert all(math.isfinite(value) for each in result.series for value in each.values)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "language_step"])
def test_a_small_size_of_every_benchmark_runs_and_prints_its_results_as_json(name, capsys, monkeypatch):
    """Its processes are run here, one after the other, which saves importing everything in each."""
    module = importlib.import_module(f"benchmarks.{name}")
    if hasattr(module, "run_child"):
        monkeypatch.setattr(module, "run_child", run_here)
    if hasattr(module, "worker"):
        monkeypatch.setattr(module, "worker", local_worker)
    check_small_size(name, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_small_size_of_every_benchmark_runs_in_processes_of_its_own(name, capsys, monkeypatch, repository):
    monkeypatch.chdir(repository)  # children are found as modules of this folder
    check_small_size(name, capsys)


def test_the_command_lists_every_benchmark_with_its_limit_and_budget(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    for about in abouts():
        assert about.name in listed
        assert about.limit in listed
    assert main(["no-such-benchmark"]) == 2


def test_every_module_of_benchmarks_is_listed(repository):
    modules = [path.stem for path in (repository / "benchmarks").glob("[!_]*.py")]
    assert sorted(NAMES) == sorted(modules)


def test_all_of_them_together_take_less_than_half_an_hour_on_cpu():
    assert sum(about.budget_seconds for about in abouts() if about.name not in ("fits", *LONG_ON_A_CPU)) <= 30 * 60


# --- programs ----------------------------------------------------------------------------------------------------------

OPTIONS = {"batch_size": 2, "length": 8, "device": "cpu", "dtype": "float32", "authors_code": "", "torchao": ""}
RUN_HERE = [
    who
    for who in training_step.MAKERS
    if who not in (training_step.AUTHORS, training_step.OFFLOAD, training_step.ADAM8, training_step.ADAM8_LEAN)
]


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning"  # peft 0.21 reads a name that transformers 5.23 has deprecated
)
@pytest.mark.parametrize("who", RUN_HERE)
def test_every_program_takes_a_step_and_its_bytes_are_added_up(who):
    program = training_step.MAKERS[who](make_model("tiny"), kept_ids("tiny"), OPTIONS)
    split: dict[str, int] = {}
    loss = training_step.take_step(program, training_step.make_batches(kept_ids("tiny"), OPTIONS), split)
    assert math.isfinite(loss)
    trained = sum(each.numel() for each in program.model.parameters() if each.requires_grad)
    if who != training_step.SPARSE:
        assert split["gradients"] == 4 * trained
        assert 8 * trained <= split["states"] <= 8 * trained + 1024  # and a step count a parameter
    assert split["weights"] == sum(each.nbytes for each in program.model.parameters())


def test_clipping_takes_sparse_gradients_and_dense_ones_to_the_same_norm():
    import torch

    losses, norms = [], []
    for who in (training_step.FULL, training_step.SPARSE):
        program = training_step.MAKERS[who](make_model("tiny"), kept_ids("tiny"), OPTIONS)
        batches = training_step.make_batches(kept_ids("tiny"), OPTIONS)
        token_ids, labels = next(batches)
        torch.manual_seed(0)
        loss = 1000 * program.model(input_ids=token_ids, labels=labels).loss  # so that there is something to clip
        loss.backward()
        parameters = list(program.model.parameters())
        training_step.clip(parameters)
        losses.append(loss.item())
        norms.append(sum(float(each.grad.to_dense().square().sum()) for each in parameters) ** 0.5)
    assert losses[0] == losses[1]
    assert norms == pytest.approx([1.0, 1.0], rel=1e-4)


def test_every_loss_of_the_output_side_gives_the_same_value_but_the_restricted_one():
    options = {"device": "cpu", "dtype": "float32", "dim": 16, "kept": 100}
    found = {
        who: output_side.program(make, 600, 32, options).forward()
        for who, make in output_side.losses(600, 32, options).items()
    }
    restricted = found.pop(output_side.RESTRICTED)
    assert all(value == pytest.approx(found[output_side.PLAIN], rel=1e-5) for value in found.values()), found
    assert restricted < found[output_side.PLAIN]


def test_trls_fused_head_gives_the_loss_too():
    pytest.importorskip("trl")
    hidden, weight = torch.randn(12, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    labels = torch.arange(12)
    found = output_side.fused_loss(output_side.TRL)(hidden, weight, labels)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels)
    torch.testing.assert_close(found, expected)
    for theirs, ours in zip(
        torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(theirs, ours)


def test_a_program_that_fails_costs_no_other(monkeypatch):
    losses = output_side.losses

    def with_one_that_fails(*words):
        def fails():
            raise RuntimeError("out of shared memory")

        return losses(*words) | {output_side.PLAIN: fails}

    monkeypatch.setattr(output_side, "losses", with_one_that_fails)
    options = {"device": "cpu", "dtype": "float32", "dim": 16, "kept": 100, "seconds_per_logit": {}}
    found = output_side.time_case("600", "32", "1", "5", json.dumps(options))
    assert found["failed"] == {output_side.PLAIN: "RuntimeError: out of shared memory"}
    assert output_side.RESTRICTED in found["pairs"]


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 100, 5000])
def test_the_largest_batch_is_found_to_within_an_eighth(limit):
    found = fits.largest_that_fits(lambda batch: batch <= limit)
    assert found <= min(limit, fits.LARGEST)
    assert found >= min(limit, fits.LARGEST) * 7 / 8 - 1


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 100, 5000])
@pytest.mark.parametrize("bend", [0, 5, 40])
def test_the_largest_batch_by_peaks_is_found_to_the_row_in_few_tries(limit, bend):
    """Peaks stay the same at first, where gradients and states are more than a batch takes."""
    asked = []

    def peak_of(batch):
        asked.append(batch)
        peak = 1000 + 10 * max(batch, bend)
        return peak if peak <= memory and batch <= limit else None

    memory = 1000 + 10 * max(limit, bend)
    found = fits.largest_by_peaks(peak_of, memory)
    assert found == min(limit, fits.LARGEST)
    assert len(asked) <= 16


# --- on paper ----------------------------------------------------------------------------------------------------------

on_an_emulated_device = pytest.mark.skipif(not accelerator.can_be_emulated(), reason="from torch 2.13 on")


def peak_of_a_step(name, who, precision, computes):
    gc.collect()
    with accelerator.in_use(computes=computes):
        module = torch.get_device_module(accelerator.NAME)
        start = module.memory_allocated()
        training = fits.make_training(name, who, precision, accelerator.NAME, filled=computes)
        for part in training.model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0  # a CPU's attention holds scores where it has dropout
        for _ in range(2):
            module.reset_peak_memory_stats()
            training.take_step(3, 16)
        return module.max_memory_allocated() - start


@on_an_emulated_device
@pytest.mark.parametrize("who", [OURS, fits.FULL])
@pytest.mark.parametrize(
    ("name", "precision"), [("tiny", "mixed"), *(("tiny-lm-64", each) for each in fits.PRECISIONS)]
)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft, as above
def test_the_counted_peak_is_that_of_a_device_that_computes(name, precision, who):
    accelerator.know_four_bits()
    peaks = [peak_of_a_step(name, who, precision, computes) for computes in (True, False)]
    assert peaks[0] == pytest.approx(peaks[1], abs=1024)  # bitsandbytes keeps a table for all models


@on_an_emulated_device
def test_what_fits_is_counted_on_paper_and_says_so(capsys, tmp_path):
    words = ["--models", "tiny-lm", "--device", "paper", "--precisions", "bf16", "--gibibytes", "0.001", "0.01"]
    (result,) = fits.main([*words, "--length", "16", "--results", str(tmp_path)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "counted: largest batch of 16 tokens a row, 0.01 GiB" in printed
    assert "not measured" in printed
    assert "Left out: workspaces of kernels" in printed
    (written,) = tmp_path.glob("fits--tiny-lm--paper--*.json")
    assert "not measured" in json.loads(written.read_text())["note"]
    batches = {(each.measure, each.who): each.median for each in result.series if each.unit == "rows"}
    assert len(batches) == 4
    for memory in ("0.001", "0.01"):
        measure = f"counted: largest batch of 16 tokens a row, {memory} GiB"
        assert batches[measure, OURS] >= batches[measure, fits.FULL]
    assert "Counted, not measured" in _report.render(abouts(), [result])
    assert "Left out" in _report.plot(result, tmp_path).read_text()


@on_an_emulated_device
@pytest.mark.parametrize(
    "name", ["training_step", *(pytest.param(name, marks=pytest.mark.slow) for name in ("language_step", "qlora_step"))]
)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft, as above
def test_a_step_is_counted_on_paper_and_takes_no_time(name, capsys):
    (result,) = importlib.import_module(f"benchmarks.{name}").main(["--size", "small", "--device", "paper"])
    assert "Counted, not measured" in capsys.readouterr().out
    assert {each.unit for each in result.series} == {"bytes"}
    assert all(each.measure.startswith("counted: ") for each in result.series)
    assert "processor" not in result.machine
    peaks = {each.who: each.median for each in result.series if each.case in ("peak", "bytes") and "peak" in str(each)}
    full = min(value for who, value in peaks.items() if who in ("QLoRA", "full fine-tuning"))
    assert all(value < full for who, value in peaks.items() if who.startswith(OURS))


@pytest.mark.slow  # other losses on paper, above, are of every run
@on_an_emulated_device
def test_a_loss_is_counted_on_paper_beside_those_that_hold_all_logits(capsys):
    words = ["--size", "small", "--device", "paper", "--dtype", "bfloat16", "--cases", "4000x512"]
    (result,) = output_side.main(words)
    assert "Counted, not measured" in capsys.readouterr().out
    assert {(each.measure, each.unit) for each in result.series} == {
        ("counted: memory of a loss beyond the layer's", "bytes")
    }
    held = {each.who: each.median for each in result.series}
    assert {output_side.FROZEN, output_side.HOST, output_side.RESTRICTED, output_side.PLAIN} <= held.keys()
    logits_bytes = 4_000 * 512 * 2
    assert held[output_side.PLAIN] > 3 * logits_bytes  # theirs, and their log-probabilities in fp32
    assert held[output_side.RESTRICTED] < held[output_side.HOST] < held[output_side.FROZEN] < held[output_side.PLAIN]
    assert logits_bytes < held[output_side.FROZEN] < 2 * logits_bytes  # scores once, and a piece of them in fp32


def test_a_benchmark_that_counts_nothing_takes_no_paper(capsys):
    with pytest.raises(SystemExit):
        epoch.main(["--device", "paper"])
    assert "invalid choice: 'paper'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tiny", "tiny-lm"])
def test_models_have_the_same_weights_each_time_and_ids_that_lie_in_them(name):
    first, second = make_model(name), make_model(name)
    assert all(a.equal(b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    ids = kept_ids(name)
    assert len(ids) == SHAPES[name].kept
    assert ids[-1] < SHAPES[name].rows
    assert (ids[1:] > ids[:-1]).all()


# --- rounds, results, tables -------------------------------------------------------------------------------------------


def test_programs_take_turns_in_alternating_order_until_the_budget_is_spent():
    seen: list[str] = []
    programs = {name: lambda name=name: seen.append(name) for name in "abc"}
    found = take_turns(programs, 2, Budget(60))
    assert seen == list("abccba")
    assert {name: len(values) for name, values in found.items()} == {"a": 2, "b": 2, "c": 2}
    assert all(len(values) == 1 for values in take_turns(programs, 9, Budget(0)).values())


def test_the_interval_of_a_median_holds_the_median_and_is_narrow_where_values_agree():
    low, high = median_interval([1.0, 2.0, 3.0, 4.0, 100.0], rounds=1000)
    assert low <= 3.0 <= high
    assert median_interval([2.0] * 9, rounds=100) == (2.0, 2.0)


def a_result(**changes):
    series = beside_ours(
        "time", "a case", "s", {OURS: [1.0, 2.0, 4.0], "a peer": [2.0, 1.0, 2.0], "limit: x": [0.1] * 3}
    )
    settings = {
        "series": tuple(series),
        "figures": (Figure("a figure", 2.0, "×", 1.0),),
        "open": ("a GPU: open: none",),
    }
    names = {"benchmark": "epoch", "title": "One epoch", "subject": "a model", "device": "cpu"}
    return Result(**names | settings | changes)


def test_ratios_are_taken_pair_by_pair():
    ours, peer, _ = a_result().series
    assert ours.ratio is None
    assert peer.ratio == 0.5  # of 2, 0.5 and 0.5; the medians' would be 1
    assert where_a_peer_is_better(a_result().series) == [["time", "a peer", "a case: 0.5 ×"]]


def test_a_result_is_read_as_it_was_written_and_named_by_benchmark_subject_hardware_and_date(tmp_path):
    result = a_result()
    path = result.write(tmp_path)
    assert Result.read(path) == result
    assert re.fullmatch(r"epoch--a-model--.+-cores--\d{4}-\d\d-\d\d\.json", path.name)


def test_the_page_has_the_last_result_of_each_subject(tmp_path):
    for date, title in (("2026-01-02", "New"), ("2026-01-01", "Old")):
        a_result(date=date, title=title).write(tmp_path)
    page = _report.render(abouts(), _report.read_all(tmp_path))
    assert "### New" in page
    assert "Old" not in page
    assert "| a peer | 2 s (1 s – 2 s), 0.5 × |" in page
    assert "| New | a figure | 2 × | 1 × | falls short |" in page
    assert "- a GPU: open: none" in page


def test_a_table_has_leanvocab_first_and_the_limit_last():
    series = [Series("time", "x", who, (1.0,), "s") for who in ("limit: y", "a peer", OURS)]
    ((_, header, rows),) = compared(series)
    assert header == ["", "x"]
    assert [row[0] for row in rows] == [OURS, "a peer", "limit: y"]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0123, "s", "12.3 ms"),
        (3.5e9, "bytes", "3.5 GB"),
        (12, "bytes", "0.012 kB"),
        (0, "s", "0 µs"),
        (1234.6, "×", "1,235 ×"),
    ],
)
def test_quantities_are_shown_in_units_that_suit_them(value, unit, text):
    assert quantity(value, unit) == text


def test_the_plots_show_every_program(tmp_path):
    result = a_result()
    drawn = _report.plot(result, tmp_path).read_text()
    assert all(each.who in drawn for each in result.series)


def test_the_page_is_what_the_result_files_give(repository):
    assert (repository / "docs" / "performance.md").read_text() == _report.render(abouts(), _report.read_all(FOLDER))
    assert (repository / "docs" / _report.SUMMARY).read_text() == render_summary(_report.read_all(FOLDER))
    for result in _report.read_all(FOLDER):
        assert not _report.plotted(result) or (repository / "docs" / "figures" / _report.plot_name(result)).exists()


def test_a_sentence_of_the_summary_without_a_figure_is_an_error():
    with pytest.raises(LookupError, match="no figure"):
        render_summary([a_result()])


def test_a_case_of_the_output_side_that_takes_too_long_is_open_and_costs_no_other(monkeypatch):
    known = {
        "pairs": {},
        "values": {},
        "late": [output_side.PLAIN],
        "failed": {output_side.CCE: "an error"},
        "products": [],
    }
    monkeypatch.setattr(output_side, "run_child", lambda *words: known)
    options = argparse.Namespace(device="cpu", dtype="float32", dim=16, kept=9, rounds=1)
    series, figures, late = output_side.run_case(options, 600, 32, Budget(1.0), {})
    assert (series, figures) == ([], [])
    assert late == [
        "plain cross-entropy at 600 rows, 32 tokens: open: over the time budget (by its time at a smaller size)",
        "CCE at 600 rows, 32 tokens: open: it failed: an error",
    ]
