"""Two processes on one CPU, joined by gloo: starting them, and the loops that they run."""

import atexit
import os
import pickle
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import leanvocab as lv
from doors import models, pairs

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


def kept(job: Job, *args: Any) -> Any:
    """Result of `start(job, folder, …)`, with a folder that stays until this process ends: several doors look at it."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return start(job, folder, *args)


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
    return models.masked(model) if family == "llama-tied" else model


def share(step: int, task: str, size: int = 8, *, whole: bool = False) -> dict[str, torch.Tensor]:
    """This rank's part of a batch, or all of it."""
    rows = models.examples(task)
    batch = [rows[(step * size + i) % len(rows)] for i in range(size)]
    part = batch[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() and not whole else batch
    return {name: torch.stack([each[name] for each in part]) for name in part[0]}


def mean(loss: torch.Tensor) -> float:
    """Over the ranks."""
    loss = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return float(loss)


def loop(model: nn.Module, wrapped: Any, family: str, run: pairs.Run) -> pairs.Run:
    """A plain training loop: `wrapped` is called, the model's tensors are kept."""
    task = "classification" if family == "llama" else "causal-lm"
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2, weight_decay=0.0)
    with pairs.held_bytes(run, model):
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


def gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    """The full state dict of a sharded model, on the first process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)))  # type: ignore[arg-type]


def fully_sharded(family: str, lean: bool) -> pairs.Run:
    """FSDP2."""
    model = sharded(made(family, lean))
    run = loop(model, model, family, pairs.Run())
    shares = torch.tensor(run.held_bytes)
    dist.all_reduce(shares)
    run.held_bytes = int(shares) if family == "llama" else 0  # the other is compared with DDP, which holds all twice
    run.tensors = gathered(model)
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


def counted() -> tuple[Any, Any]:
    """Counts of each rank's shard of a stream, added up; and of the whole."""
    import datasets
    from datasets.distributed import split_dataset_by_node

    rows = datasets.Dataset.from_dict({"input_ids": models.token_rows(101).tolist()})
    stream = rows.to_iterable_dataset(num_shards=4)
    mine = lv.count_tokens(
        split_dataset_by_node(stream, dist.get_rank(), dist.get_world_size()), full_size=models.FULL_SIZE
    )
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return sum(parts), lv.count_tokens(rows, full_size=models.FULL_SIZE)


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
    given["shrunk late"] = pairs.refused(lambda: models.lean(sharded(made("llama", False))))
    trainer(folder / "trainer")
    return {**given, "folder": folder}


def trainer(folder: Path) -> None:
    """transformers' Trainer with two ranks, full and shrunk, each with a checkpoint after two steps of four."""
    from doors.trainer import train

    for lean in (False, True):
        train(
            made("llama", lean), folder / str(lean), per_device_train_batch_size=2, max_steps=4, save_strategy="steps",
            save_steps=2, ddp_backend="gloo",
        )  # fmt: skip
