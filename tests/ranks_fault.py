"""Ranks that train until one of them, in its third step, does what a test asks for."""

import os
import signal
import sys
import time

import ranks_torch
import torch
from torch import nn

from dpsgd import PrivacyConfig
from dpsgd.torch.distributed import connect, disconnect
from dpsgd.torch.models import cross_entropy, optimizer
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


def sharded(ranks):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    config = PrivacyConfig(
        num_examples=1000, sample_rate=0.01, steps=10, noise_multiplier=0.0, clip_norm=1.0
    )
    options = {"loss": cross_entropy, "physical_batch_size": ranks_torch.P, "ranks": ranks}
    return Sharded(model, optimizer(model, "sgd", 1.0), config, **options)


def main(folder, kind, victim):
    torch.set_num_threads(1)
    ranks = connect(device="cpu", timeout_s=TIMEOUT_S)
    kind, _, how = kind.partition(" ")
    step = ranks_torch.build("torch-bookkeeping", ranks) if not how else sharded(ranks)
    even = bool(how)  # each physical batch needs all
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
