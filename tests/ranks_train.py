"""``python -m dpsgd.train`` on a rank that may be killed: $KILL is ``rank:update``."""

import sys

from launch import fated

from dpsgd.torch.step import TorchStep
from dpsgd.train import main

if __name__ == "__main__":
    fated(TorchStep)
    sys.exit(main(sys.argv[1:]))
