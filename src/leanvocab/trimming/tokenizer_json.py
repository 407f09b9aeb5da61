"""tokenizer.json with some of its tokens, under new ids: everything else in it stays as it is. No torch."""

from collections.abc import Iterator, Mapping
from typing import Any

from leanvocab.errors import VocabularyError
from leanvocab.trimming.splits import merged, merges_of

_PARTS = {
    "version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model",
}  # fmt: skip
_PAIRS = {"BertProcessing": ("sep", "cls"), "RobertaProcessing": ("sep", "cls")}


def inserted_ids(state: Mapping[str, Any]) -> set[int]:
    """Ids of added tokens, and those that a tokenizer puts around text or pads with; they are told by nothing in a text.

    Raises:
        VocabularyError: there is a part in which ids may stand that are not known.
    """
    if unknown := state.keys() - _PARTS:
        raise VocabularyError(f"its part {min(unknown)!r} is not known; ids may stand in it")
    ids = {token["id"] for token in state.get("added_tokens") or ()}
    for processor in _processors(state.get("post_processor")):
        ids |= {processor[name][1] for name in _PAIRS.get(processor["type"], ())}
        ids |= {token_id for token in (processor.get("special_tokens") or {}).values() for token_id in token["ids"]}
    return ids | ({state["padding"]["pad_id"]} if state.get("padding") else set())


def trimmed_state(state: Mapping[str, Any], kind: str, new_ids: Mapping[int, int]) -> dict[str, Any]:
    """The content of tokenizer.json with the tokens whose ids have new ones; `kind` is the type of its model."""
    trimmed = dict(state)
    trimmed["model"] = _trimmed_model(state["model"], kind, new_ids)
    trimmed["added_tokens"] = [token | {"id": new_ids[token["id"]]} for token in state.get("added_tokens") or ()]
    if state.get("post_processor"):
        trimmed["post_processor"] = _renumbered_processor(state["post_processor"], new_ids)
    if state.get("padding"):
        trimmed["padding"] = state["padding"] | {"pad_id": new_ids[state["padding"]["pad_id"]]}
    return trimmed


def _trimmed_model(model: Mapping[str, Any], kind: str, new_ids: Mapping[int, int]) -> dict[str, Any]:
    trimmed, vocab = dict(model), model["vocab"]
    if not isinstance(vocab, Mapping):
        trimmed["vocab"] = [entry for place, entry in enumerate(vocab) if place in new_ids]
        if model.get("unk_id") is not None:
            trimmed["unk_id"] = new_ids[model["unk_id"]]
        return trimmed
    kept = {token: new_ids[token_id] for token, token_id in vocab.items() if token_id in new_ids}
    trimmed["vocab"] = kept
    if kind == "BPE":
        merges = zip(model["merges"], merges_of(model), strict=True)
        trimmed["merges"] = [
            merge for merge, (left, right) in merges if {left, right, merged(model, left, right)} <= kept.keys()
        ]
    return trimmed


def _processors(processor: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if processor is None:
        return
    kind = processor.get("type")
    if kind == "Sequence":
        for part in processor["processors"]:
            yield from _processors(part)
    elif kind in ("TemplateProcessing", "ByteLevel", *_PAIRS):
        yield processor
    else:
        raise VocabularyError(f"its post-processor {kind!r} is not known; ids may stand in it")


def _renumbered_processor(processor: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    renumbered = dict(processor)
    if processor["type"] == "Sequence":
        renumbered["processors"] = [_renumbered_processor(part, new_ids) for part in processor["processors"]]
    for name in _PAIRS.get(processor["type"], ()):
        token, token_id = processor[name]
        renumbered[name] = [token, new_ids[token_id]]
    if "special_tokens" in processor:
        renumbered["special_tokens"] = {
            name: token | {"ids": [new_ids[token_id] for token_id in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
    return renumbered
