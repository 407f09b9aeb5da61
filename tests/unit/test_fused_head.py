"""TRL's fused head on a partial vocabulary gives what it gives on the full model, with frozen rows' gradients masked."""

import copy
import types
from typing import Any

import pytest
import torch
from models import small_lm
from references import check_close, gradients, lm_batch, lm_vocabulary, mask_gradients

from leanvocab.errors import BypassError, MissingTokenError
from leanvocab.model.shrink import merge_, shrink_
from leanvocab.output import trl_losses as fused_head

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL's imports
trl_utils = pytest.importorskip("trl.trainer.utils")

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def fused(model: Any, **options: Any) -> Any:
    trl_utils.add_fused_lm_head(model, outputs=FIELDS, **options)
    return model


def shrunk(name: str, **options: Any) -> Any:
    return shrink_(small_lm(name), lm_vocabulary(), **options)


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "gemma2-softcap", "cohere-scale", "granite-scaling"])
def test_every_field_and_every_gradient_is_that_of_the_full_model(name: str) -> None:
    full, lean = fused(small_lm(name), temperature=0.7), fused(shrunk(name, output="frozen"), temperature=0.7)
    expected, found = (model(**lm_batch(), fused_lm_head=True) for model in (full, lean))
    assert found.keys() == expected.keys()
    for field in expected:
        torch.testing.assert_close(found[field], expected[field], rtol=1e-4, atol=1e-5)
    for output in (expected, found):
        (output.loss + 0.3 * output.entropy.sum()).backward()
    mask_gradients(full, lm_vocabulary())
    check_close(gradients(lean, lm_vocabulary()), gradients(full, lm_vocabulary()), 1e-4)


def test_labels_that_are_shifted_already_are_scored_where_they_stand() -> None:
    batch = lm_batch()
    shifted = {"input_ids": batch["input_ids"], "shift_labels": batch["labels"], "num_items_in_batch": 7}
    expected, found = (
        model(**shifted, fused_lm_head=True) for model in (fused(small_lm("llama-tied")), fused(shrunk("llama-tied")))
    )
    torch.testing.assert_close(found.log_probs, expected.log_probs)
    torch.testing.assert_close(found.loss, expected.loss)


def test_a_restricted_head_scores_the_kept_tokens_alone() -> None:
    lean, batch = fused(shrunk("llama-untied", output="restricted")), lm_batch()
    found = lean(**batch, fused_lm_head=True)
    scores = lean(batch["input_ids"]).logits[:, :-1]
    expected = scores.log_softmax(-1).gather(-1, batch["labels"][:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found.log_probs, expected.masked_fill(~found.label_mask, 0))
    (found.loss - found.entropy.sum()).backward()
    assert all(bool(p.grad.isfinite().all()) for p in lean.parameters() if p.grad is not None)
    assert bool(found.mean_logits.isfinite().all())


def test_a_batch_whose_labels_are_all_ignored_gives_a_zero_that_is_part_of_the_graph() -> None:
    lean = fused(shrunk("llama-tied"))
    loss = lean(input_ids=lm_batch()["input_ids"], labels=torch.full((3, 10), -100), fused_lm_head=True).loss
    loss.backward()
    assert float(loss) == 0


def test_without_the_argument_a_model_gives_logits_as_ever() -> None:
    lean, batch = fused(shrunk("llama-tied")), lm_batch()
    torch.testing.assert_close(lean(**batch).loss, small_lm("llama-tied")(**batch).loss)


def test_a_deep_copy_answers_too() -> None:
    lean = fused(copy.deepcopy(shrunk("llama-tied")))
    full = fused(small_lm("llama-tied"))
    torch.testing.assert_close(lean(**lm_batch(), fused_lm_head=True).loss, full(**lm_batch(), fused_lm_head=True).loss)


def test_merging_takes_the_hooks_off_and_the_full_head_is_trls_own() -> None:
    lean = shrunk("llama-tied")
    merge_(lean)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in lean.modules())
    full = fused(small_lm("llama-tied"))
    assert torch.equal(fused(lean)(**lm_batch(), fused_lm_head=True).loss, full(**lm_batch(), fused_lm_head=True).loss)


def test_a_forward_that_is_called_around_the_hooks_is_refused() -> None:
    with pytest.raises(BypassError, match="Call the model instead of its forward"):
        fused(shrunk("llama-tied")).forward(**lm_batch(), fused_lm_head=True)


def test_a_head_that_is_cast_is_refused() -> None:
    lean = fused(shrunk("llama-tied"), cast_lm_head_to_fp32=True)
    with pytest.raises(BypassError, match="leave cast_lm_head_to_fp32 out"):
        lean(**lm_batch(), fused_lm_head=True)


def test_a_forward_that_raises_leaves_nothing_behind() -> None:
    lean = fused(shrunk("llama-tied"))
    with pytest.raises(MissingTokenError):
        lean(input_ids=torch.full((1, 4), 10**6), labels=torch.ones(1, 4).long(), fused_lm_head=True)
    assert not fused_head.forwards_under_way
    assert float(lean(**lm_batch(), fused_lm_head=True).loss) > 0


def test_a_forward_that_is_put_in_place_after_the_first_one_is_watched_anew() -> None:
    """As TRL's distillation does: it rolls out first, and then reads both matrices in a forward of its own."""
    lean, batch = shrunk("llama-tied"), lm_batch()
    lean(**batch)

    def around(self: Any, input_ids: Any, **kwargs: Any) -> Any:
        hidden = self.model(input_ids).last_hidden_state
        return hidden @ self.lm_head.weight.T

    lean.forward = types.MethodType(around, lean)
    with pytest.raises(BypassError, match="around the lookup"):
        lean(**batch)
