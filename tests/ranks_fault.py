"""Ranks that train until one of them, in its third step, does what a test asks for."""

import os
import signal
import sys
import time

import ranks_torch
import torch

from dpsgd.torch.distributed import connect, disconnect
from dpsgd.torch.sharded import Sharded

TIMEOUT_S = 6.0


def fault(kind):
    if kind == "dies":
        os._exit(9)
    if kind == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "hangs":
        time.sleep(1000)
    if kind == "raises":
        raise ZeroDivisionError("a secret")


def main(folder, kind, victim):
    torch.set_num_threads(1)
    ranks = connect(device="cpu", timeout_s=TIMEOUT_S)
    kind, _, how = kind.partition(" ")
    even = how == "sharded"  # each physical batch needs all
    step = ranks_torch.build(Sharded if even else "torch-bookkeeping", ranks)
    try:
        for number in range(1, 6):
            if number == 3 and ranks.rank == int(victim):
                if kind == "ends":
                    break
                fault(kind)
            odd = kind == "differs" and number == 3 and ranks.rank == int(victim)
            ranks_torch.drive(step, ranks, (4 + odd,), even=even)
    except BaseException as error:
        disconnect(ranks, error)
        raise
    disconnect(ranks)


if __name__ == "__main__":
    main(*sys.argv[1:])
