"""How many processors this box gives to the client: all its libraries, not PyTorch alone.

Must be called before other threads are started, as they take over what is set here.
"""

import os

import torch


def bound_processors(threads: int) -> None:
    """Let this process use at most ``threads`` processors from now on.

    PyTorch is told how many threads to start. Tokenizers and file readers start as many
    as they find processors, so on Linux the process is held to the last ``threads`` of
    those that it may use.
    """
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        mine = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, mine[-threads:])
