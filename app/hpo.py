#!/usr/bin/env python3
"""Search hyperparameters over clones of a ClearML task: `python hpo.py --help`."""

import sys

from starling.cli.hpo import main

if __name__ == "__main__":
    sys.exit(main())
