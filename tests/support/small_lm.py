"""Small language models, tied and untied, with everything that models do to their logits, and the full-model references."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from leanvocab.model.shrink import merge_, shrink_
from leanvocab.model.status import status
from leanvocab.output import loss as output_loss
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

FULL_SIZE = 300
KEPT = np.sort(np.random.default_rng(0).choice(np.arange(3, FULL_SIZE), 60, replace=False))
_DECODER: dict[str, Any] = {
    "vocab_size": FULL_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0,
}  # fmt: skip
_ENCODER = {
    **_DECODER,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 64,
}
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": FULL_SIZE, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip

_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "llama-tied": lambda: _made("Llama", "ForCausalLM", **_DECODER, tie_word_embeddings=True),
    "llama-untied": lambda: _made("Llama", "ForCausalLM", **_DECODER, tie_word_embeddings=False),
    "gemma2-softcap": lambda: _made("Gemma2", "ForCausalLM", **_DECODER, head_dim=8, final_logit_softcapping=2.0),
    "cohere-scale": lambda: _made("Cohere", "ForCausalLM", **_DECODER, logit_scale=0.3),
    "granite-scaling": lambda: _made("Granite", "ForCausalLM", **_DECODER, logits_scaling=3.0, tie_word_embeddings=True),
    "phi-bias": lambda: _made("Phi", "ForCausalLM", **_DECODER, partial_rotary_factor=0.5),
    "bert-mlm": lambda: _made("Bert", "ForMaskedLM", **_ENCODER),
    "bart-final-bias": lambda: _made("Bart", "ForConditionalGeneration", **_SEQ2SEQ),
    "t5-tied": lambda: _made(
        "T5", "ForConditionalGeneration", vocab_size=FULL_SIZE, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
        dropout_rate=0.0, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    ),
}  # fmt: skip
NAMES = tuple(_BUILDERS)


def _made(family: str, head: str, **config: Any) -> nn.Module:
    return getattr(transformers, family + head)(getattr(transformers, f"{family}Config")(**config))  # type: ignore[no-any-return]


def small_lm(name: str) -> nn.Module:
    """A randomly initialised language model, the same at each call; biases of vocabulary size are not zero."""
    torch.manual_seed(0)
    model = _BUILDERS[name]()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.shape in ((FULL_SIZE,), (1, FULL_SIZE)):
                tensor.normal_()
    return model


def small_gemma3n(full_size: int = FULL_SIZE) -> Any:
    """The config of a Gemma 3n: a table for each layer, whose vocabulary is smaller than that of its input table."""
    return transformers.Gemma3nTextConfig(
        vocab_size=full_size, vocab_size_per_layer_input=full_size - 20, hidden_size=16, hidden_size_per_layer_input=8,
        intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_kv_shared_layers=0, layer_types=["full_attention"] * 2, activation_sparsity_pattern=[0.0] * 2, laurel_rank=2,
        pad_token_id=0,
    )  # fmt: skip


def hold_few_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of tokens and several blocks of rows, as real sizes have them."""
    for device in output_loss.CHUNK_BYTES:
        monkeypatch.setitem(output_loss.CHUNK_BYTES, device, 7 * 4 * FULL_SIZE)
    monkeypatch.setattr("leanvocab.output.projection.STREAMED_BYTES", 77 * 32 * 4)


def lm_vocabulary() -> PartialVocabulary:
    """60 ids, and those that the models insert."""
    return PartialVocabulary(sorted({0, 1, 2, *KEPT.tolist()}), FULL_SIZE)


def lm_batch(step: int = 0, *, ids: Any = KEPT) -> dict[str, Tensor]:
    """Three rows of kept ids; the first labels are ignored."""
    generator = torch.Generator().manual_seed(100 + step)
    chosen = torch.as_tensor(np.asarray(ids))
    input_ids = chosen[torch.randint(0, len(chosen), (3, 10), generator=generator)]
    labels = chosen[torch.randint(0, len(chosen), (3, 10), generator=generator)]
    labels[0, :4] = -100
    return {"input_ids": input_ids, "labels": labels}


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """The vocabulary matrices of a full model."""
    found = {id(p): p for p in model.parameters() if p.ndim == 2 and p.shape[0] == FULL_SIZE}
    return list(found.values())


def mask_gradients(model: nn.Module, vocabulary: PartialVocabulary, of: Iterable[nn.Parameter] | None = None) -> None:
    """What frozen rows mean for the full model: no gradient for rows outside the vocabulary."""
    outside = torch.ones(FULL_SIZE, dtype=torch.bool)
    outside[torch.tensor(vocabulary.token_ids)] = False
    for matrix in matrices(model) if of is None else of:
        if matrix.grad is not None:
            matrix.grad[outside] = 0


def restrict(model: Any, vocabulary: PartialVocabulary) -> None:
    """What the restricted objective means for the full model: −inf for the scores of ids outside the vocabulary."""
    barred = torch.full((FULL_SIZE,), -torch.inf)
    barred[torch.tensor(vocabulary.token_ids)] = 0
    if getattr(model.config, "final_logit_softcapping", None):  # which would make −inf finite: after it, then
        loss = model.loss_function
        model.loss_function = lambda logits, *args, **kwargs: loss(logits + barred.to(logits), *args, **kwargs)
        return
    model.get_output_embeddings().register_forward_hook(lambda module, args, logits: logits + barred.to(logits))


def reference(model: nn.Module, output: str, vocabulary: PartialVocabulary) -> nn.Module:
    """The full model with the objective of an output mode."""
    full = copy.deepcopy(model)
    if output == "restricted":
        restrict(full, vocabulary)
    return full


def gradients(model: nn.Module, vocabulary: PartialVocabulary) -> dict[str, Tensor]:
    """Gradients by name, those of vocabulary matrices on the kept rows alone."""
    kept = torch.tensor(vocabulary.token_ids)
    full = {id(matrix) for matrix in matrices(model)}
    return {
        name: parameter.grad[kept] if id(parameter) in full else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def check_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """By norm, tensor for tensor; tensors that are zero but for rounding are compared with the largest one."""
    assert found.keys() == expected.keys()
    largest = max(float(value.detach().float().norm()) for value in expected.values())
    for name, value in expected.items():
        error = float((found[name].detach().float() - value.detach().float()).norm())
        assert error <= tolerance * max(float(value.detach().float().norm()), 0.1 * largest), (name, error)


def check_twenty_steps(name: str, output: Any, device: str = "cpu", **options: Any) -> None:
    """Twenty steps of SGD: the losses and gradients of the full model with the other rows' gradients masked."""
    vocabulary = lm_vocabulary()
    base = small_lm(name).to(device)
    full, lean = reference(base, output, vocabulary), copy.deepcopy(base)
    shrink_(lean, vocabulary, output=output, **options)
    assert status(lean).output == output
    steppers = [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for model in (full, lean)]
    for step in range(20):
        losses = []
        for model, optimizer in zip((full, lean), steppers, strict=True):
            optimizer.zero_grad()
            loss = model(**{key: value.to(device) for key, value in lm_batch(step).items()}).loss
            loss.backward()
            losses.append(loss.item())
        mask_gradients(full, vocabulary)
        assert abs(losses[1] - losses[0]) <= 1e-5 * abs(losses[0])
        check_close(gradients(lean, vocabulary), gradients(full, vocabulary), 1e-5)
        for optimizer in steppers:
            optimizer.step()
    merge_(lean)
    check_close(dict(lean.named_parameters()), dict(full.named_parameters()), 1e-5)
    assert_unused_rows_are_the_bases(lean, base, vocabulary)


def assert_unused_rows_are_the_bases(lean: nn.Module, base: nn.Module, vocabulary: Any) -> None:
    outside = torch.ones(len(matrices(base)[0]), dtype=torch.bool)
    outside[torch.tensor(vocabulary.token_ids)] = False
    for first, second in zip(matrices(lean), matrices(base), strict=True):
        assert torch.equal(first[outside], second[outside])


def token_loss(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """The next-token loss as hand-written loops have it."""
    return F.cross_entropy(logits[:, :-1].reshape(-1, FULL_SIZE), labels[:, 1:].reshape(-1), **options)
