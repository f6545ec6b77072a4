#!/usr/bin/env python3
"""Run a trainer, and run it again when it crashes: the main process of every replica. Standard library only."""

import sys

from starling.supervise import main

if __name__ == "__main__":
    sys.exit(main())
