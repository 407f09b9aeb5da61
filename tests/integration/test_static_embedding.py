"""sentence-transformers' StaticEmbedding, whose bag is shrunk: from texts to a delta, and from that to a model that loads."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

import leanvocab as lv
from leanvocab.model.shrink import merge_, shrink_

SIZE, DIM = 300, 24
TEXT = " ".join(f"w{i}" for i in range(7, SIZE, 6))


def test_static_embeddings_are_saved_as_deltas_of_their_module_and_merged(tmp_path: Path) -> None:
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    from sentence_transformers import SentenceTransformer

    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(SIZE)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model = SentenceTransformer(modules=[modules.StaticEmbedding(tokenizer, embedding_dim=DIM)], device="cpu")
    model.save_pretrained(str(tmp_path / "base"), create_model_card=False)
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    vocabulary = lv.PartialVocabulary.from_counts(lv.count_tokens([ids]), tokenizer=tokenizer)
    assert (vocabulary.full_size, list(vocabulary)) == (SIZE, ids)
    shrink_(model, vocabulary).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model(model.preprocess([TEXT]))["sentence_embedding"].sum().backward()
    optimizer.step()
    lv.save_delta(model[0], tmp_path / "delta", base=tmp_path / "base")
    lv.merge_checkpoint(base=tmp_path / "base", delta=tmp_path / "delta", output=tmp_path / "merged")
    again = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    assert torch.equal(again.state_dict()["0.embedding.weight"], model.state_dict()["0.embedding.weight"])
    assert (again.encode([TEXT]) == merge_(model).encode([TEXT])).all()
