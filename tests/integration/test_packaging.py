"""The wheel and the source archive: what is in them, what they say of themselves, and that what they declare is enough."""

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import leanvocab

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def test_the_wheel_holds_every_module_its_types_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    source = REPOSITORY / "src"
    own = {str(path.relative_to(source)) for path in source.rglob("*.py")} | {"leanvocab/py.typed"}
    assert names == own
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_the_archive_holds_what_builds_it_and_the_pages(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "docs/limits.md",
        "src/leanvocab/py.typed",
    } <= names
    assert not [name for name in names if name.startswith(("tests", ".cache", "benchmarks"))]


def test_the_metadata_say_what_the_project_says(metadata: Message) -> None:
    assert metadata["Name"] == "leanvocab"
    assert metadata["Version"] == leanvocab.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown"
    body = str(metadata.get_payload())
    assert "Get the whole model back" in body
    assert re.findall(r"\]\((?!https?://)", body) == []


def test_the_version_has_its_part_of_the_changelog() -> None:
    heads = re.findall(r"^## \[([^\]]+)\]", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[:2] == ["Unreleased", leanvocab.__version__]
    assert f"\nversion: {leanvocab.__version__}\n" in (REPOSITORY / "CITATION.cff").read_text()


def distributions(metadata: Message) -> dict[str, Distribution]:
    """What a package needs, and what that needs, without extras, as pip would install it."""
    needed: dict[str, Distribution] = {}
    waiting = metadata.get_all("Requires-Dist") or []
    while waiting:
        requirement = Requirement(waiting.pop())
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        extras = requirement.extras or {""}
        if requirement.marker and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras} - {None}
        ):
            continue
        if name not in needed:
            needed[name] = distribution(requirement.name)
            waiting += needed[name].requires or []
    return needed


@pytest.fixture(scope="module")
def alone(wheel: zipfile.ZipFile, metadata: Message, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and links to the distributions that it declares, as a fresh environment would have."""
    folder = tmp_path_factory.mktemp("alone")
    wheel.extractall(folder)
    for needed in distributions(metadata).values():
        for top in {file.parts[0] for file in needed.files or () if file.parts[0] not in ("..", "bin", "__pycache__")}:
            target = folder / top
            if not target.exists():
                target.symlink_to(Path(str(needed.locate_file(top))))
    return folder


def run_alone(alone: Path, code: str, home: Path) -> str:
    command = [sys.executable, "-S", "-P", "-c", code]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(alone), "HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_with_what_it_declares_alone_a_model_is_shrunk_trained_and_saved(alone: Path, tmp_path: Path) -> None:
    code = """
import torch, transformers, leanvocab as lv
config = transformers.BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
model = transformers.BertForSequenceClassification(config)
ids = torch.tensor([[1, 5, 9], [1, 9, 7]])
vocabulary = lv.PartialVocabulary.from_counts(lv.count_tokens(ids), model=model)
print(lv.estimate_memory(config, vocabulary))
lv.shrink_(model, vocabulary)
optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
optimizer.step()
model.save_pretrained("out")
print(transformers.AutoModel.from_pretrained("out").get_input_embeddings().weight.shape)
"""
    assert "torch.Size([60, 16])" in run_alone(alone, code, tmp_path)


def test_with_what_it_declares_alone_the_command_answers_and_names_the_extra_that_it_needs(
    alone: Path, tmp_path: Path
) -> None:
    assert "finetune" in run_alone(
        alone, "import sys; sys.argv = ['leanvocab', '--help']; from leanvocab.cli import main; main()", tmp_path
    )
    code = """
from leanvocab.extras import require
try:
    require("accelerate", "finetune")
except ImportError as error:
    print(error)
"""
    assert "pip install 'leanvocab[finetune]'" in run_alone(alone, code, tmp_path)
