"""FSDP2 over the processes of torchrun: shrink, then shard; what is saved is the whole model, as ever:
torchrun --nproc-per-node 2 examples/fsdp2.py MODEL DATA.csv OUTPUT
"""

import sys

import torch
import torch.distributed as dist
from datasets import load_dataset
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import leanvocab as lv


def main(name: str, data: str, output: str) -> None:
    dist.init_process_group()
    rank, size, where = dist.get_rank(), dist.get_world_size(), "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
    rows = tokenizer(list(load_dataset("csv", data_files=data, split="train")["text"]))["input_ids"]
    lv.shrink_(model, lv.PartialVocabulary.from_counts(lv.count_tokens(rows), tokenizer=tokenizer, model=model))
    fully_shard(model, mesh=dist.init_device_mesh(where, (size,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    for row in rows[rank : len(rows) // size * size : size]:
        model(**dict.fromkeys(["input_ids", "labels"], torch.tensor([row], device=where))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:  # it got the full vocabulary, put together from all processes
        model.save_pretrained(output, state_dict=state)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
