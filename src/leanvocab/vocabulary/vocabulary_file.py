"""The file of a vocabulary: JSON that a person can open. Everything about its form is here.

{
  "format": "leanvocab.vocabulary",
  "version": 1,
  "full_size": 250002,            rows of the full matrix
  "num_token_ids": 5944,
  "digest": "3b0c…",              PartialVocabulary.digest of what follows; checked on loading
  "token_ids": [0, 1, 2, 3, …],   sorted
  "tokens": {"0": "<s>", …}       only where a tokenizer was known; for readers, never read back
}
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from leanvocab.errors import VocabularyError
from leanvocab.files import strict_json

FORMAT, VERSION = "leanvocab.vocabulary", 1

_IDS_IN_A_LINE = 16
_REQUIRED = {"format", "version", "full_size", "num_token_ids", "digest", "token_ids"}


def compose(full_size: int, token_ids: Sequence[int], digest: str, tokens: Mapping[int, str]) -> str:
    """The text of the file."""
    head = {
        "format": FORMAT,
        "version": VERSION,
        "full_size": full_size,
        "num_token_ids": len(token_ids),
        "digest": digest,
    }
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    starts = range(0, len(token_ids), _IDS_IN_A_LINE)
    rows = [", ".join(map(str, token_ids[start : start + _IDS_IN_A_LINE])) for start in starts]
    lines.append('  "token_ids": [' + ",".join(f"\n    {row}" for row in rows) + "\n  ]" + ("," if tokens else ""))
    if tokens:
        named = [f'    "{token_id}": {json.dumps(token, ensure_ascii=False)}' for token_id, token in tokens.items()]
        lines.append('  "tokens": {\n' + ",\n".join(named) + "\n  }")
    return "{\n" + "\n".join(lines) + "\n}\n"


def parse(text: bytes) -> dict[str, Any]:
    """The content of a file, every part of it checked but what the digest and the full size say of the ids.

    Raises:
        VocabularyError: it is no such file.
    """
    try:
        content = strict_json.parse(text)
    except (ValueError, RecursionError) as error:
        raise VocabularyError(f"expected JSON as PartialVocabulary.save writes it: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise VocabularyError(f'expected a JSON object with "format": "{FORMAT}"')
    version = content.get("version")
    if type(version) is not int or version != VERSION:
        raise VocabularyError(f"expected version {VERSION}, got {version!r}: was it written by another leanvocab?")
    for name in sorted(_REQUIRED - content.keys()):
        raise VocabularyError(f"{name!r} is missing")
    for name in sorted(content.keys() - _REQUIRED - {"tokens"}):
        raise VocabularyError(f"{name!r} is not known")
    _check_ids(content["token_ids"], content["num_token_ids"])
    return content


def _check_ids(ids: Any, num_ids: Any) -> None:
    if not isinstance(ids, list) or not all(type(token_id) is int for token_id in ids):
        raise VocabularyError("expected 'token_ids' as a list of integers")
    if type(num_ids) is not int or num_ids != len(ids):
        raise VocabularyError(f"'num_token_ids' is {num_ids!r}, but there are {len(ids)} token ids")
    if any(left >= right for left, right in pairwise(ids)):
        raise VocabularyError("expected 'token_ids' sorted, each once")
    if ids and not (ids[0] >= 0 and ids[-1] < 2**63):
        raise VocabularyError(f"expected 'token_ids' of 0 or more, below the full size, got {ids[0]} to {ids[-1]}")
