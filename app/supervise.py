#!/usr/bin/env python3
"""Run a trainer, and restart it after a crash: the main process of every replica. Standard library only."""

import sys

from starling.supervise import main

if __name__ == "__main__":
    sys.exit(main())
