"""What every test shares: no network, no state from the machine, and real data where it lies beside the project."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Set before anything imports huggingface_hub or datasets, which read these once; subprocesses inherit them.
_home = tempfile.mkdtemp(prefix="leanvocab-tests-")
atexit.register(shutil.rmtree, _home, ignore_errors=True)
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HOME=_home,
    MPLBACKEND="Agg",
    MPLCONFIGDIR=_home,
    TOKENIZERS_PARALLELISM="false",  # it warns, and may hang, where a test forks
)
for _name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
    os.environ.pop(_name, None)  # each would win over HF_HOME

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data (tokenizers, GLUE, the paper's tables); skips where there is none."""
    folder = Path(os.environ.get("LEANVOCAB_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data at {folder}: set LEANVOCAB_SHARED to the folder that holds data/ and paper/")
    return folder


@pytest.fixture
def loud_libraries_afterwards() -> Iterator[None]:
    """Commands silence transformers and datasets; the tests after these are not to notice."""
    import datasets
    import transformers

    from leanvocab.cli.printing import DEBUG_VARIABLE

    verbosity = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()
    datasets.enable_progress_bars()
    os.environ.pop(DEBUG_VARIABLE, None)


@pytest.fixture
def few_scores_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of tokens and several blocks of rows, as real sizes have them."""
    from models import EXACT, FULL_SIZE

    from leanvocab.output import loss, scores

    monkeypatch.setattr(scores, "SMALLEST_PIECE_BYTES", 0)
    for device in loss.CHUNK_BYTES:
        monkeypatch.setitem(loss.CHUNK_BYTES, device, 7 * 4 * FULL_SIZE)
    monkeypatch.setattr("leanvocab.output.projection.STREAMED_BYTES", 77 * EXACT.width * 4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pretrained model of texts, with its tokenizer."""
    from texts import save_pretrained

    return save_pretrained(tmp_path_factory.mktemp("pretrained") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with labelled texts to train and to validate on."""
    from texts import write_splits

    return write_splits(tmp_path_factory.mktemp("data"))
