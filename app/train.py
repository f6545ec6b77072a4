#!/usr/bin/env python3
"""Train a detector, or search its hyperparameters together with every other worker: `python train.py --help`."""

from starling.cli.command import leave
from starling.cli.train import main

if __name__ == "__main__":
    leave(main())
