"""A fuzzer over the readers: `python tests/fuzz/fuzz_readers.py --seconds 600 --corpus tests/fuzz/corpus` (needs atheris).

Each input is a kind (one byte) and the bytes of one file: a safetensors file, a shard index, or a delta's description. The
reader must give a result or raise `CheckpointError`; anything else is a crash. What it gives must hold together. Memory
growth and slow inputs fail too.
"""

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["leanvocab"]):
    from leanvocab.checkpoints.delta_format import CONFIG, DESCRIPTION, TENSORS, read_delta
    from leanvocab.checkpoints.merge import merge_checkpoint
    from leanvocab.errors import CheckpointError
    from leanvocab.files.headers import INDEX, SINGLE, read_header, read_weights

SLOW_SECONDS, GROWTH_BYTES = 2.0, 256 << 20
KINDS = (
    f"single/{SINGLE}", f"sharded/{INDEX}", "sharded/model-00001-of-00002.safetensors",
    f"delta/{DESCRIPTION}", f"delta/{TENSORS}", f"single/{CONFIG}",
)  # fmt: skip


class Readers:
    """The readers over one folder, whose pristine files are put back where an input replaced them."""

    def __init__(self, folder: Path, pristine: Path):
        self.folder, self.pristine = folder, pristine
        readers: list[Callable[[], object]] = [self._single, self._sharded, self._sharded, *[self._merge] * 3]
        self.kinds = list(zip(KINDS, readers, strict=True))
        shutil.copytree(pristine, folder, dirs_exist_ok=True)
        self.peak_at_start = 0

    def _single(self) -> None:
        file = read_header(self.folder / "single", SINGLE)
        covered = sum(entry.num_bytes for entry in file.tensors.values()) + len(file.raw)
        assert covered == file.num_bytes == (self.folder / "single" / SINGLE).stat().st_size
        self._merge()

    def _sharded(self) -> None:
        read_weights(self.folder / "sharded")

    def _merge(self) -> None:
        read_delta(self.folder / "delta")
        out = self.folder / "out"
        try:
            merge_checkpoint(base=self.folder / "single", delta=self.folder / "delta", output=out, progress=False)
            read_weights(out)  # what is merged can be read
        finally:
            shutil.rmtree(out, ignore_errors=True)
            assert not list(self.folder.glob(".*"))

    def __call__(self, data: bytes) -> None:
        """One input: atheris calls this."""
        if not data:
            return
        name, read = self.kinds[data[0] % len(self.kinds)]
        path, started = self.folder / name, time.monotonic()
        path.write_bytes(data[1:])
        try:
            read()
        except CheckpointError as error:
            if str(self.folder) not in str(error):
                raise AssertionError("an error that names no file") from error
        finally:
            original = self.pristine / name
            path.write_bytes(original.read_bytes()) if original.exists() else path.unlink()
        seconds = time.monotonic() - started
        assert seconds < SLOW_SECONDS, f"an input took {seconds:.1f} s"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.peak_at_start = self.peak_at_start or peak
        assert peak < self.peak_at_start + GROWTH_BYTES, f"memory grew from {self.peak_at_start:,} to {peak:,} bytes"


def write_corpus(corpus: Path, pristine: Path) -> None:
    """The pristine files as inputs, one of each kind, where the corpus has none."""
    corpus.mkdir(parents=True, exist_ok=True)
    for kind, name in enumerate(KINDS):
        path = corpus / f"pristine-{kind}"
        if (pristine / name).exists() and not path.exists():
            path.write_bytes(bytes([kind]) + (pristine / name).read_bytes())
    small = {
        0: b"\x02\0\0\0\0\0\0\0{}",
        1: b'{"weight_map": {"a": "../b.safetensors"}}',
        5: json.dumps({"auto_map": 1}).encode(),
    }
    for kind, content in small.items():
        (corpus / f"small-{kind}").write_bytes(bytes([kind]) + content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path, default=Path(__file__).parent / "corpus")
    parser.add_argument("--pristine", type=Path, required=False, help="folder that holds single, sharded and delta")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        pristine = options.pristine or Path(made) / "pristine"
        if options.pristine is None:
            sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
            from disk import tiny_folders

            tiny_folders(pristine)
        (Path(made) / "grown").mkdir()
        write_corpus(options.corpus, pristine)
        readers = Readers(Path(made) / "here", pristine)
        flags = [
            f"-max_total_time={options.seconds}",
            "-max_len=4096",
            "-rss_limit_mb=4096",
            "-timeout=10",
            "-verbosity=0",
            "-print_final_stats=1",
        ]
        atheris.Setup([sys.argv[0], *flags, str(Path(made) / "grown"), str(options.corpus)], readers)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
