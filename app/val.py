#!/usr/bin/env python3
"""Validate a detector, or an ensemble: `python val.py --help`."""

import sys

from starling.cli.val import main

if __name__ == "__main__":
    sys.exit(main())
