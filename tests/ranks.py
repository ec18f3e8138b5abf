"""Ranks for tests that are not about torchrun: forked from one process that has imported everything, which takes seconds.

With a GPU each imports for itself, in the environment that a test has made for it.
"""

import multiprocessing
import os
import socket
import sys

import torch
import torch.multiprocessing as mp

multiprocessing.set_forkserver_preload(
    ["trapo_train.cli", "trapo_train.train", "transformers.models.llama.modeling_llama", "datasets", "torch.distributed.fsdp"]
)
_METHOD = "spawn" if torch.cuda.is_available() else "forkserver"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(function, size, *arguments):
    """`function(rank, *arguments)` in `size` processes at once, with the environment that torchrun gives them; raises what one of
    them raises."""
    mp.start_processes(_rank, args=(function, size, free_port(), arguments), nprocs=size, start_method=_METHOD)


def _rank(rank, function, size, port, arguments):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(rank, *arguments)


def run(size, log, *arguments):
    """What the ranks of `trapo-train arguments…` print, which is in the file `log`, too."""
    try:
        start(_command, size, log, arguments)
    except mp.ProcessExitedException as error:
        raise AssertionError(log.read_text()[-3000:]) from error
    return log.read_text()


def _command(rank, log, arguments):
    from trapo_train import cli

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.exit(cli.main([str(argument) for argument in arguments]))
