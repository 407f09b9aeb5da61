"""One run: fine-tune a model in one mode, merge it, and measure the merged model."""

import statistics
import time
import warnings
from typing import Any

import torch

import leanvocab as lv
from leanvocab.errors import LeanVocabWarning
from studies.output_modes.grid import Cell, Settings
from studies.output_modes.measures import drift, evaluate, generate
from studies.output_modes.pretrained import Pretrained
from studies.output_modes.texts import Texts, TokenizedTexts, tokenized

WARM_UP_RATIO = 0.1


def run(cell: Cell, pretrained: Pretrained, texts: Texts, settings: Settings) -> dict[str, Any]:
    """Everything that a run is and found, ready for JSON."""
    torch.manual_seed(cell.seed)
    model = pretrained.load()
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    full_size = model.get_input_embeddings().num_embeddings
    data = tokenized(texts, pretrained.tokenizer, full_size, settings, cell.seed)
    trained = {} if cell.mode == "base" else _finetune(model, cell, data, settings)
    return {
        "cell": cell.name,
        "mode": cell.mode,
        "vocabulary": cell.vocabulary,
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "vocabulary_rows": {name: len(vocabulary) for name, vocabulary in data.vocabularies.items()},
        "full_rows": full_size,
        "training": trained,
        **_measured(model, base, cell, pretrained, texts, data, settings),
    }


def _measured(
    model: Any,
    base: dict[str, torch.Tensor],
    cell: Cell,
    pretrained: Pretrained,
    texts: Texts,
    data: TokenizedTexts,
    settings: Settings,
) -> dict[str, Any]:
    against = {
        name: vocabulary for name, vocabulary in data.vocabularies.items() if cell.vocabulary in (None, name)
    }  # fmt: skip
    held_out = {
        domain: evaluate(model, rows, against, settings.batch_size) for domain, rows in data.held_out.items()
    }  # fmt: skip
    return {
        "held_out": held_out,
        "drift": drift(model, base, against),
        "generations": generate(model, pretrained.tokenizer, texts.prompts, against, settings.num_new_tokens),
    }


def _finetune(model: Any, cell: Cell, data: TokenizedTexts, settings: Settings) -> dict[str, Any]:
    """Trains the model, merges it where it was shrunk, and says what training cost."""
    if cell.vocabulary is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LeanVocabWarning)  # that restricted is another objective is the question
            lv.shrink_(model, data.vocabularies[cell.vocabulary], output=cell.mode)
    losses, seconds, cpu_seconds = _train(model, data.trained, cell, settings)
    if cell.vocabulary is not None:
        lv.merge_(model)
    return {
        "losses": losses,
        "median_step_seconds": statistics.median(seconds),
        "median_step_cpu_seconds": statistics.median(cpu_seconds),
    }


def _train(
    model: Any, rows: torch.Tensor, cell: Cell, settings: Settings
) -> tuple[list[float], list[float], list[float]]:
    """AdamW without decay, gradients clipped at norm 1, a short warm-up and a linear way down; each row once."""
    assert cell.learning_rate is not None
    optimizer = torch.optim.AdamW(model.parameters(), lr=cell.learning_rate, weight_decay=0.0, fused=True)
    warm_up = max(1, round(WARM_UP_RATIO * settings.num_steps))

    def factor(step: int) -> float:
        return min((step + 1) / warm_up, (settings.num_steps - step) / (settings.num_steps - warm_up + 1), 1.0)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses, seconds, cpu_seconds = [], [], []
    model.train()
    for batch in rows.split(settings.batch_size):
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=False)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
        losses.append(float(loss.detach()))
    return losses, seconds, cpu_seconds
