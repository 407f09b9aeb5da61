"""Tables say what was counted; plots are files that a reader can open, the same for the same numbers."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import transformers
from rich.console import Console

import leanvocab as lv
from leanvocab.errors import MissingExtraError, VocabularyError
from leanvocab.reports.plots import plot_memory, plot_vocabulary_use
from leanvocab.reports.vocabulary_use import vocabulary_use


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


def shown(renderable):
    console = Console(file=io.StringIO(), width=100)
    console.print(renderable)
    return " ".join(console.file.getvalue().split())


def test_use_is_counted_by_hand():
    use = vocabulary_use(lv.count_tokens([[5, 5, 5, 5, 5, 5], [2, 2, 2], [7]], full_size=10))
    assert (use.num_tokens, use.used_rows, use.once_rows, use.full_rows) == (10, 3, 1, 10)
    assert use.used_ratio == 0.3
    assert use.coverage_rows == {0.5: 1, 0.9: 2, 0.99: 3}
    assert use.most_frequent == (("id 5", 6), ("id 2", 3), ("id 7", 1))


def test_use_names_tokens_where_a_tokenizer_is_known():
    class Tokenizer:
        def convert_ids_to_tokens(self, token_id):
            return f"[word{token_id}]"

    use = vocabulary_use(lv.count_tokens([[5, 5, 2]], full_size=10), tokenizer=Tokenizer())
    assert use.most_frequent == (("[word5]", 2), ("[word2]", 1))
    assert "most frequent: [word5]" in shown(use)  # brackets are no markup


def test_use_becomes_json_and_a_table():
    use = vocabulary_use(zipf_counts())
    read = json.loads(json.dumps(use.to_dict()))
    assert read["used_rows"] == 120
    assert read["used_ratio"] == 0.24
    assert read["coverage_rows"]["0.5"] == use.coverage_rows[0.5]
    text = shown(use)
    assert "rows used │ 120 │ 24.0 %" in text
    assert f"rows that cover 90% of the tokens │ {use.coverage_rows[0.9]}" in text


def test_nothing_counted_is_shown_as_nothing():
    counts = lv.TokenCounts(np.zeros(10, np.int64), 10)
    use = vocabulary_use(counts)
    assert (use.num_tokens, use.used_rows, use.coverage_rows) == (0, 0, {0.5: 0, 0.9: 0, 0.99: 0})
    assert "rows used │ 0 │ 0.0 %" in shown(use)


def test_use_without_a_full_size_is_an_error():
    counts = lv.TokenCounts(np.array([3, 0, 2]))
    with pytest.raises(VocabularyError, match="full size of the vocabulary is unknown: give full_size="):
        vocabulary_use(counts)
    assert vocabulary_use(counts, full_size=4).used_ratio == 0.5
    with pytest.raises(VocabularyError, match="token id 2 was counted, the full size is 2"):
        vocabulary_use(counts, full_size=2)


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


def test_the_plot_of_memory_names_models_bytes_and_what_is_saved(tmp_path):
    estimate = tiny_estimate()
    texts = svg_texts(plot_memory({"a model": estimate}, tmp_path / "memory.svg"))
    assert estimate.full.total_bytes < 1e6  # so it is shown in kB
    assert "weights, gradients and optimizer states (kB; adamw, float32)" in texts
    assert {"a model", "full", "partial", "layers", "vocabulary"} <= set(texts)
    assert f"{estimate.full.total_bytes / 1e3:.2f}" in texts
    assert f"{estimate.partial.total_bytes / 1e3:.2f}  (−{100 * estimate.saved_ratio:.1f} %)" in texts


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
