"""One process of a data-parallel run."""

import os
import socket

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from .model import TinyConfig
from .train import Options, Trainer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def work(rank: int, options: Options, config: TinyConfig, processes: int, port: int) -> None:
    """One process of the run, pinned to a core of its own: the slowest one sets the pace."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity") and processes > 1:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    if processes > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", address, rank=rank, world_size=processes)
    tokenizer = Tokenizer.from_file(str(options.folder / "tokenizer.json"))
    Trainer(options, tokenizer, config, rank, processes).run()
