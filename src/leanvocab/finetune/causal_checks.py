"""Checks of the tokens that a causal language model sees: one that it sees changes what it says.

Both questions cost one forward of a few tokens, before long work; the answers to them cannot be read off a config.
"""

from typing import Any

import torch
from torch import Tensor

from leanvocab.errors import ModelError, SettingsError

_NUM_TOKENS = 4
_TOLERANCE = 1e-4  # of the largest logit: batched kernels may round differently, a seen token changes the first digits


def check_causal(network: Any) -> None:
    """Raises ModelError where what a model says at a position depends on the tokens after it, which it is to predict."""
    one, other = _two_texts(network)
    changed = torch.cat([one[:, :-1], other[:, -1:]], dim=1)
    if _differs(_logits(network, one)[:, :-1], _logits(network, changed)[:, :-1]):
        raise ModelError(
            f"{type(network).__name__} sees the tokens that it is to predict, and would learn to copy them: it is no causal "
            "language model; save it with is_decoder=True in its config, or train it as masked-lm"
        )


def check_packed_examples_are_apart(network: Any) -> None:
    """Raises SettingsError where an example sees another one that lies before it in the same row."""
    one, other = _two_texts(network)
    positions = torch.arange(_NUM_TOKENS, device=one.device).repeat(2)[None]
    inputs = {"position_ids": positions, "use_cache": False}  # as in training
    try:
        alone = _logits(network, torch.cat([one, one], dim=1), **inputs)
        beside = _logits(network, torch.cat([other, one], dim=1), **inputs)
    except TypeError as error:
        raise SettingsError(f"packing: {type(network).__name__} takes no position_ids; leave packing out") from error
    if _differs(alone[:, _NUM_TOKENS:], beside[:, _NUM_TOKENS:]):
        raise SettingsError(
            f"packing: in {type(network).__name__} ({network.config._attn_implementation} attention) an example would see the "
            "one before it in the same block, since its attention mask does not follow position_ids; leave packing out"
        )


def _two_texts(network: Any) -> tuple[Tensor, Tensor]:
    """Two rows [1, tokens] that differ in every token, where the model is."""
    spread = network.get_input_embeddings().num_embeddings // (2 * _NUM_TOKENS + 1)
    ids = torch.arange(1, 2 * _NUM_TOKENS + 1, device=network.device) * max(1, spread)
    return ids[None, :_NUM_TOKENS], ids[None, _NUM_TOKENS:]


@torch.no_grad()
def _logits(network: Any, ids: Tensor, **inputs: Any) -> Tensor:
    was_training = network.training
    network.eval()
    try:
        logits: Tensor = network(input_ids=ids, **inputs).logits
    finally:
        network.train(was_training)
    return logits


def _differs(first: Tensor, second: Tensor) -> bool:
    return float((first - second).abs().max()) > _TOLERANCE * float(first.abs().max())
