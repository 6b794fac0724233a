"""
``python -m dpsgd.train`` on a rank that may be killed: $KILL is ``rank:update``.

Several runs in one launch are separated by ``then``.
"""

import sys

from launch import fated

from dpsgd.torch.step import TorchStep
from dpsgd.train import main

if __name__ == "__main__":
    fated(TorchStep)
    runs = [line.split() for line in " ".join(sys.argv[1:]).split(" then ")]
    sys.exit(max(map(main, runs)))
