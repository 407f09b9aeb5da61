"""The door to TRL's losses, which read the matrix of the output layer around it.

TRL's trainers give a model a forward that takes `fused_lm_head=True`, multiplies hidden states with `lm_head.weight` itself,
and gives log-probabilities of labels. Of a partial matrix these would be of other tokens, and TRL cannot switch it off. Two of
torch's hooks take the argument away, and make what was asked for of lazy logits: in chunks too, over the output mode's softmax
(docs/decisions/trls-losses.md).
"""

import sys
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from leanvocab.choices import IGNORE_INDEX
from leanvocab.errors import BypassError
from leanvocab.output.layer import RemapLinear
from leanvocab.output.lazy_logits import LazyLogits
from leanvocab.output.loss import tokens_at_once
from leanvocab.partial.attachments import keep_hooks

_FORWARD = "_fused_forward"  # the name of TRL's function, whose closure holds what its trainer chose
forwards_under_way: list[tuple[nn.Module, dict[str, Any]]] = []  # the modules, and what they were asked for


def serve(model: nn.Module) -> None:
    """Sees to it that what holds a partial output layer answers `fused_lm_head=True`."""
    above = [module for module in model.modules() if _holds_output(module) and not isinstance(module, RemapLinear)]
    for module in above:
        if _enter not in module._forward_pre_hooks.values():
            keep_hooks(
                module,
                module.register_forward_pre_hook(_enter, with_kwargs=True),
                module.register_forward_hook(_leave, always_call=True),
            )
            for child in module.children():
                if not _holds_output(child):
                    keep_hooks(child, child.register_forward_pre_hook(_refuse_unserved))


def _holds_output(module: nn.Module) -> bool:
    return any(isinstance(each, RemapLinear) for each in module.modules())


def _enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    if not kwargs.get("fused_lm_head") or not _holds_output(module):
        return None
    own = {name: kwargs.pop(name, None) for name in ("labels", "shift_labels", "num_items_in_batch", "fused_lm_head")}
    forwards_under_way.append((module, own | _chosen(module)))
    return args, {**kwargs, "use_cache": False}


def _leave(module: nn.Module, args: Any, output: Any) -> Any:
    if not forwards_under_way or forwards_under_way[-1][0] is not module:
        return None
    asked = forwards_under_way.pop()[1]
    return None if output is None else _answer(module, output, **asked)  # None where the forward raised


def _chosen(module: nn.Module) -> dict[str, Any]:
    """Temperature and fields, as the trainer gave them to its function."""
    for inner in module.modules():
        for name in ("_original_forward", "forward"):  # accelerate keeps what it wraps under the first
            function = getattr(inner.__dict__.get(name), "__func__", None)
            if function is not None and function.__code__.co_name == _FORWARD:
                values = (cell.cell_contents for cell in function.__closure__)
                chosen = dict(zip(function.__code__.co_freevars, values, strict=True))
                if not chosen["cast_lm_head_to_fp32"]:
                    return {"fields": chosen["outputs"], "temperature": chosen["temperature"]}
    raise BypassError(
        f"{type(module).__name__}: fused_lm_head=True with cast_lm_head_to_fp32=True, or in a way that is not known here, would "
        "read the rows of a partial vocabulary as those of the full one; leave cast_lm_head_to_fp32 out, or train with "
        'output="full"'
    )


def _refuse_unserved(module: nn.Module, args: Any) -> None:
    """The body of a model runs for a fused head that was asked for around the hooks: `model.forward(…)`."""
    if torch.compiler.is_compiling():  # TRL does not compile its forward
        return
    frame: FrameType | None = sys._getframe(1)
    for _ in range(12):
        if frame is not None and frame.f_code.co_name == _FORWARD and frame.f_locals.get("fused_lm_head"):
            raise BypassError(
                f"{type(frame.f_locals['self']).__name__}.forward was asked for fused_lm_head=True around the module's hooks: "
                "it would read the rows of a partial vocabulary as those of the full one. Call the model instead of its "
                "forward; where a wrapper (an adapter) does so, wrap the model first and shrink it then"
            )
        frame = frame and frame.f_back


def _answer(module: Any, output: Any, fields: tuple[str, ...], temperature: float, **asked: Any) -> Any:
    from trl.trainer.utils import FusedCausalLMOutput

    logits, labels = output.logits, asked["shift_labels"]
    if labels is None:  # the next token's; an adapter's virtual tokens come first, and have none
        labels = F.pad(asked["labels"], (logits.shape[1] - asked["labels"].shape[1], 0), value=IGNORE_INDEX)[:, 1:]
        logits = logits[:, :-1]
    mask = labels != IGNORE_INDEX
    scores, targets = (logits[mask] / temperature).float(), labels[mask]
    flat = {"log_probs": -F.cross_entropy(scores, targets, reduction="none"), **_statistics(scores, targets, fields)}
    values = {name: value.new_zeros(mask.shape).masked_scatter(mask, value) for name, value in flat.items()}
    count = asked["num_items_in_batch"]
    loss = -values["log_probs"].sum() / (mask.sum().clamp(min=1) if count is None else count)
    aux_loss = getattr(output, "aux_loss", None)
    if aux_loss is not None:  # experts
        loss = loss + getattr(module.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
    return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **values)


def _statistics(scores: LazyLogits, targets: Tensor, fields: tuple[str, ...]) -> dict[str, Tensor]:
    """Fields beside the loss, a few tokens at a time; computed again where a gradient is asked for."""
    step = tokens_at_once(scores.device, 4, scores.shape[-1])
    starts = range(0, max(len(targets), 1), step) if set(fields) - {"log_probs"} else ()
    chunks = [(scores[at : at + step], targets[at : at + step]) for at in starts]
    parts = [checkpoint(_statistics_of, *each, use_reentrant=False) for each in chunks]
    return {name: torch.cat([part[name] for part in parts]) for name in fields if name != "log_probs"}


def _statistics_of(scores: LazyLogits, targets: Tensor) -> dict[str, Tensor]:
    values = scores.of().compute()
    log_probs = values.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0)).sum(-1)
    with torch.no_grad():
        there = values.isfinite()  # restricted: the columns that there are
        mean, is_top1 = values.where(there, 0).sum(-1) / there.sum(-1), values.argmax(-1) == targets
        return {
            "entropy": entropy,
            "log_sum_sq_probs": (2 * log_probs).logsumexp(-1),
            "mean_logits": mean,
            "is_top1": is_top1,
        }
