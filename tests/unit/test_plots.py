"""Plots are files that a reader can open, the same for the same numbers."""

import subprocess
import sys

import numpy as np
import pytest
import transformers

import leanvocab as lv
from leanvocab.errors import MissingExtraError
from leanvocab.reports.plots import plot_memory, plot_vocabulary_use


def zipf_counts(full_size=500, used=120):
    counts = np.zeros(full_size, np.int64)
    ids = np.random.default_rng(0).permutation(full_size)[:used]
    counts[ids] = 1000 // np.arange(1, used + 1)
    return lv.TokenCounts(counts, full_size)


def tiny_estimate():
    config = transformers.BertConfig(
        vocab_size=500, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return lv.estimate_memory(config, 120)


FIRST_BYTES = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.mark.parametrize("suffix", FIRST_BYTES)
def test_plots_are_written_in_the_format_of_the_suffix_the_same_each_time(tmp_path, suffix):
    draw = {
        "use": lambda path: plot_vocabulary_use(zipf_counts(), path),
        "memory": lambda path: plot_memory({"one": tiny_estimate(), "two": tiny_estimate()}, path),
    }
    for name, plot in draw.items():
        first, second = plot(tmp_path / f"{name}-1{suffix}"), plot(tmp_path / f"{name}-2{suffix}")
        assert first == tmp_path / f"{name}-1{suffix}"
        assert first.read_bytes().startswith(FIRST_BYTES[suffix])
        assert first.read_bytes() == second.read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


def svg_texts(path):
    """Texts of an SVG, which matplotlib notes beside the glyphs it draws."""
    lines = path.read_text().splitlines()
    return [line.strip()[5:-4] for line in lines if line.strip().startswith("<!-- ")]


def test_the_plot_of_use_names_its_axes_and_the_used_rows(tmp_path):
    texts = svg_texts(plot_vocabulary_use(zipf_counts(), tmp_path / "use.svg"))
    for text in ("rank of the token", "occurrences", "rows, most frequent first", "tokens covered (%)", "not used"):
        assert text in texts
    assert "120 used (24.0 %)" in texts


def test_the_plot_of_use_says_by_how_many_rows_shares_are_covered(tmp_path):
    counts = lv.TokenCounts(np.repeat([0, 9900, 90, 9, 1], [46, 1, 1, 1, 1]), 50)
    texts = svg_texts(plot_vocabulary_use(counts, tmp_path / "use.svg"))
    assert {"99 % by 1", "99.9 % by 2", "99.99 % by 3"} <= set(texts)


def test_the_plot_of_memory_names_models_bytes_and_what_is_saved(tmp_path):
    estimate = tiny_estimate()
    texts = svg_texts(plot_memory({"a model": estimate}, tmp_path / "memory.svg"))
    assert estimate.full.total_bytes < 1e6  # so it is shown in kB
    assert "weights, gradients and optimizer states (kB; adamw, float32)" in texts
    assert {"a model", "full", "partial", "layers", "vocabulary"} <= set(texts)
    assert f"{estimate.full.total_bytes / 1e3:.2f}" in texts
    assert f"{estimate.partial.total_bytes / 1e3:.2f}  (−{100 * estimate.saved_ratio:.1f} %)" in texts


def test_the_loss_of_a_language_model_is_a_part_of_its_own(tmp_path):
    """Most of what a small model of a large vocabulary holds: among the layers it would be taken for theirs."""
    config = transformers.LlamaConfig(
        vocab_size=500, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    estimate = lv.estimate_memory(config, 120, auto_class="AutoModelForCausalLM", num_tokens=100)
    path = plot_memory({"a model": estimate}, tmp_path / "memory.svg")
    texts = svg_texts(path)
    assert "loss of a step" in texts
    assert "weights, gradients, optimizer states and loss (kB; adamw, float32)" in texts
    assert path.read_text().count("fill: #d55e00") == 3  # full, partial, and the legend's
    without = lv.estimate_memory(config, 120, auto_class="AutoModelForCausalLM")
    assert "loss of a step" not in svg_texts(plot_memory({"a model": without}, tmp_path / "without.svg"))


def test_a_single_estimate_is_plotted_under_its_own_name(tmp_path):
    texts = svg_texts(plot_memory(tiny_estimate(), tmp_path / "memory.svg"))
    assert "BertForSequenceClassification" in texts


def test_plotting_leaves_the_callers_settings_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot_vocabulary_use(zipf_counts(), tmp_path / "use.png")
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_a_plot_is_an_error_with_the_pip_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'leanvocab\[plot\]'"):
        plot_vocabulary_use(zipf_counts(), tmp_path / "use.png")
    assert list(tmp_path.iterdir()) == []


def test_importing_the_room_loads_neither_matplotlib_nor_torch():
    code = "import sys, leanvocab.reports.plots; print([m for m in ('matplotlib', 'torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
