"""Checkpoints on disk that the tests share: a trained model beside its base and its delta, and folders as bytes."""

import hashlib
import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
from comparing import train
from models import batch, small_model, used_vocabulary
from safetensors import safe_open
from torch import Tensor, nn

from leanvocab.checkpoints.delta_saving import save_delta
from leanvocab.model.shrink import shrink_
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary


def listing(folder: Path) -> list[str]:
    """Every file and folder below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, byte for byte; links as what they say."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = b"-> " + str(path.readlink()).encode()
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def read_all(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files, read by the safetensors library."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    return tensors


def save_as_loaded(model: nn.Module, folder: Path, **options: Any) -> None:
    """Saves a model as one that was loaded is saved: from 5.0 to 5.3 transformers gives layer norms other names then."""
    with tempfile.TemporaryDirectory() as other:
        model.save_pretrained(other)  # type: ignore[operator]
        type(model).from_pretrained(other).save_pretrained(folder, **options)  # type: ignore[attr-defined]


def trained_pair(
    folder: Path, family: str = "roberta", *, max_shard_size: str = "5GB", **changes: Any
) -> tuple[nn.Module, nn.Module]:
    """(ordinarily trained, trained while shrunk), both from a base that is saved in `folder / "base"` with side files."""
    model = small_model(family, **changes)
    save_as_loaded(model, folder / "base", max_shard_size=max_shard_size)
    (folder / "base" / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "base" / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "base" / "notes").mkdir()
    (folder / "base" / "notes" / "a.txt").write_text("kept")
    full, shrunk = (type(model).from_pretrained(folder / "base") for _ in range(2))
    shrink_(shrunk, used_vocabulary())
    inputs = batch() | ({"labels": batch()["input_ids"]} if family.endswith("tied") else {})
    for each in (full, shrunk):
        train(each, **inputs)
    return full, shrunk


def delta_of_base(folder: Path, **options: Any) -> nn.Module:
    """Makes `folder / "base"` and `folder / "delta"`, and returns the ordinarily trained model that both give together."""
    full, shrunk = trained_pair(folder, **options)
    save_delta(shrunk, folder / "delta")
    return full


def write_file(
    path: Path, tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str] | None = None
) -> None:
    """The ten-line writer of the safetensors format that readers are tested against: name → (dtype, shape, bytes)."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, value) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(value)]}
        data += value
    write_raw(path, json.dumps(header).encode(), data)


def write_raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    """A file with any header, and any length said of it."""
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def random_rows(rows: int, dim: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tiny_module() -> nn.Module:
    """Two tables and a head, the same at each call; saved in some hundred bytes."""
    torch.manual_seed(0)
    return nn.ModuleDict({"table": nn.Embedding(40, 6), "per_layer": nn.Embedding(40, 10), "head": nn.Linear(6, 2)})


def tiny_folders(folder: Path) -> nn.Module:
    """`single` and `sharded` bases of `tiny_module`, and `delta`; returns the model that they give together."""
    from safetensors.torch import save_file, save_model

    model, expected = tiny_module(), tiny_module()
    for name in ("single", "sharded"):
        (folder / name).mkdir(parents=True)
        (folder / name / "tokenizer.json").write_text("{}")
    save_model(model, str(folder / "single" / "model.safetensors"), metadata={"format": "pt"})
    shards = {
        "model-00001-of-00002.safetensors": ("table.", "head."),
        "model-00002-of-00002.safetensors": ("per_layer.",),
    }
    weight_map = {}
    for shard, prefixes in shards.items():
        tensors = {name: value for name, value in model.state_dict().items() if name.startswith(prefixes)}
        save_file(tensors, folder / "sharded" / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    index = {"metadata": {"total_size": 2616}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    shrink_(model, {"table": PartialVocabulary([1, 2, 5, 39], 40), "per_layer": PartialVocabulary([0, 3, 4], 40)})
    with torch.no_grad():
        model["table"].weight.add_(1)
        model["per_layer"].weight.mul_(2)
        model["head"].bias.add_(1)
        expected["table"].weight[[1, 2, 5, 39]] += 1
        expected["per_layer"].weight[[0, 3, 4]] *= 2
        expected["head"].bias.add_(1)
    save_delta(model, folder / "delta", base=folder / "single")
    return expected
