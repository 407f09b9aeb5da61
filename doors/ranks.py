"""Two processes on one CPU, joined by gloo: starting them, and the loops that they run."""

import contextlib
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import leanvocab as lv
from doors import models, pairs
from doors.registry import Outcome

Job = Callable[..., Any]


def start(job: Job, folder: Path, *args: Any, size: int = 2, **options: Any) -> Any:
    """Runs `job(folder, …)` in `size` processes, and returns what it gave in the first one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    work = (size, port, folder, job, args, options)
    torch.multiprocessing.spawn(_work, work, nprocs=size, join=True)  # type: ignore[no-untyped-call]
    return pickle.loads((folder / "given.pickle").read_bytes())


def _work(rank: int, size: int, port: int, folder: Path, job: Job, args: Any, options: Any) -> None:
    import warnings

    warnings.simplefilter("ignore")
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    try:
        given = job(folder, *args, **options)
        if rank == 0:
            (folder / "given.pickle").write_bytes(pickle.dumps(given))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def made(family: str, lean: bool) -> nn.Module:
    """The shrunk model, or the full one; whose unused rows get no gradient where the output layer is tied."""
    model = models.make_model(family, attention_dropout=0.0) if "llama" in family else models.make_model(family)
    if lean:
        return models.lean(model)
    return models.mask_gradients(model) if family == "llama-tied" else model


def share(step: int, task: str, size: int = 8) -> dict[str, torch.Tensor]:
    """This rank's part of a batch."""
    rows = models.examples(task)
    batch = [rows[(step * size + i) % len(rows)] for i in range(size)]
    part = batch[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else batch
    return {name: torch.stack([each[name] for each in part]) for name in part[0]}


def mean(loss: torch.Tensor) -> float:
    """Over the ranks."""
    loss = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return float(loss)


def loop(model: nn.Module, wrapped: Any, family: str, run: pairs.Run, *, whole: bool = True) -> pairs.Run:
    """A plain training loop: `wrapped` is called, the model's tensors are kept."""
    task = "classification" if family == "llama" else "causal-lm"
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2, weight_decay=0.0)
    with pairs.held_bytes(run, model) if whole else contextlib.nullcontext():
        for step in range(4):
            loss = wrapped(**share(step, task)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.losses.append(mean(loss))
    return run


def alone(family: str, lean: bool) -> pairs.Run:
    """One process with the whole batch."""
    model = made(family, lean)
    run = loop(model, model, family, pairs.Run())
    run.tensors = pairs.state_of(model)
    return run


def data_parallel(family: str, lean: bool) -> pairs.Run:
    """DistributedDataParallel."""
    model = made(family, lean)
    run = loop(model, nn.parallel.DistributedDataParallel(model), family, pairs.Run())
    run.tensors = pairs.state_of(model)
    return run


def sharded(model: Any) -> Any:
    """FSDP2, a layer a group."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gathered(model: nn.Module, family: str, lean: bool) -> dict[str, torch.Tensor]:
    """What the ranks hold, put together and loaded into a model of one process: its full state dict."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    with lv.partial_state_dicts(model) if lean else contextlib.nullcontext():
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() > 0:  # the first one got it all
        return {}
    other = made(family, lean)
    with lv.partial_state_dicts(other) if lean else contextlib.nullcontext():
        other.load_state_dict(state)
    return pairs.state_of(other)


def fully_sharded(family: str, lean: bool) -> pairs.Run:
    """FSDP2."""
    model = sharded(made(family, lean))
    run = loop(model, model, family, pairs.Run(), whole=False)
    run.tensors = gathered(model, family, lean)
    return run


def accelerated(folder: Path, family: str, lean: bool) -> pairs.Run:
    """A plain loop with accelerate: accumulation, clipping, a saved state that is loaded again, a saved model."""
    from accelerate import Accelerator

    task = "classification" if family == "llama" else "causal-lm"
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    made_model = made(family, lean)
    optimizer = torch.optim.AdamW(made_model.parameters(), lr=1e-2, weight_decay=0.0)
    loader: Any = torch.utils.data.DataLoader(models.examples(task), batch_size=4)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(made_model, optimizer, loader)
    run = pairs.Run(folder=folder)
    with pairs.held_bytes(run, made_model):
        for epoch in range(2):
            for batch in loader:
                with accelerator.accumulate(model):
                    loss = model(**batch).loss
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                run.losses.append(float(accelerator.gather(loss.detach().reshape(1)).mean()))
            if epoch == 0:
                accelerator.save_state(str(folder / "state"))
    run.tensors = pairs.state_of(made_model)
    accelerator.save_model(model, str(folder / "model"))
    accelerator.wait_for_everyone()
    accelerator.load_state(str(folder / "state"))
    run.tensors |= {f"state.{name}": value for name, value in pairs.state_of(made_model).items()}
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return run


def layouts(folder: Path, family: str = "llama-tied") -> list[str]:
    """One checkpoint through every layout of ranks, and back; names what differs."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    first = sharded(made(family, True))
    loop(first, first, family, pairs.Run(), whole=False)
    state = [gathered(first, family, True)]
    dist.broadcast_object_list(state)
    with lv.partial_state_dicts(first):
        dcp.save(get_model_state_dict(first), checkpoint_id=str(folder / "dcp"))
    found = {}
    one = made(family, True)
    one.load_state_dict(state[0])
    found["one process"] = pairs.state_of(one)
    parallel = nn.parallel.DistributedDataParallel(made(family, True))
    parallel.module.load_state_dict(state[0])
    found["DDP"] = {name.removeprefix("module."): each for name, each in pairs.state_of(parallel).items()}
    with lv.partial_state_dicts(one):
        partial = {name: value.clone() for name, value in one.state_dict().items()}
    again = sharded(made(family, True))
    with lv.partial_state_dicts(again):
        set_model_state_dict(again, partial, options=StateDictOptions(full_state_dict=True))
    found["FSDP2"] = gathered(again, family, True)
    other = made(family, True)
    with lv.partial_state_dicts(other):
        into = other.state_dict()
        dcp.load(into, checkpoint_id=str(folder / "dcp"))
        other.load_state_dict(into)
    found["a sharded checkpoint on disk"] = pairs.state_of(other)
    full = models.make_model(family)
    full.load_state_dict(state[0])
    found["without leanvocab"] = pairs.state_of(full)
    return [
        name
        for name, each in found.items()
        if dist.get_rank() == 0
        and (each.keys() != state[0].keys() or any(not torch.equal(each[key], state[0][key]) for key in each))
    ]


def counted() -> tuple[Any, Any]:
    """Counts of each rank's shard of a stream, added up; and of the whole."""
    import datasets
    from datasets.distributed import split_dataset_by_node

    rows = datasets.Dataset.from_dict({"input_ids": models.token_rows(101).tolist()})
    stream = rows.to_iterable_dataset(num_shards=4)
    mine = lv.count_tokens(split_dataset_by_node(stream, dist.get_rank(), dist.get_world_size()), full_size=500)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return sum(parts), lv.count_tokens(rows, full_size=500)


def zero(folder: Path, stage: int, **options: Any) -> list[pairs.Run]:
    """DeepSpeed ZeRO, full and shrunk; the tensors are gathered on every rank."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    runs = []
    for lean in (False, True):
        model = made("llama", lean)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        settings = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage, **options}}
        settings |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        run = pairs.Run()
        for step in range(4):
            loss = engine(**share(step, "classification")).loss
            engine.backward(loss)
            engine.step()
            run.losses.append(mean(loss))
        gather = deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3)
        with gather:
            run.tensors = pairs.state_of(model)
        runs.append(run)
    return runs


def zero3_saved(folder: Path) -> tuple[int, Outcome]:
    """Rows of the table in the state dict that ZeRO-3 consolidates; what comes of its own checkpoint."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    model = made("llama", True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    stage = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    settings = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": stage, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    state = engine._zero3_consolidated_16bit_state_dict()
    rows = len(state["model.embed_tokens.weight"]) if state else 0
    return rows, pairs.refused(lambda: engine.save_checkpoint(str(folder / "checkpoint")))


def zero3_frozen(folder: Path) -> Outcome:
    """A step of a language model whose output layer is frozen in part."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    model = made("llama-tied", True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return pairs.refused(lambda: engine(**share(0, "causal-lm")).loss.backward())


def everything(folder: Path) -> dict[str, Any]:
    """All that two processes do, in one start of them."""
    given: dict[str, Any] = {"counts": counted()}
    for family in ("llama", "llama-tied"):
        for lean in (False, True):
            given[f"ddp {family} {lean}"] = data_parallel(family, lean)
            given[f"accelerate {family} {lean}"] = accelerated(folder / f"{family} {lean}", family, lean)
    given["fsdp llama False"] = fully_sharded("llama", False)
    given["fsdp llama True"] = fully_sharded("llama", True)
    given["fsdp llama-tied True"] = fully_sharded("llama-tied", True)
    given["layouts"] = layouts(folder)
    given["full state of a shard"] = pairs.refused(sharded(made("llama", True)).state_dict)
    given["shrunk late"] = pairs.refused(lambda: models.lean(sharded(made("llama", False))))
    trainer(folder / "trainer")
    return given


def trainer(folder: Path) -> None:
    """transformers' Trainer with two ranks, full and shrunk, each with a checkpoint after two steps of four."""
    from doors.trainer import train

    for lean in (False, True):
        train(
            made("llama", lean), folder / str(lean), per_device_train_batch_size=2, max_steps=4, save_strategy="steps",
            save_steps=2, ddp_backend="gloo",
        )  # fmt: skip
