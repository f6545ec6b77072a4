#!/usr/bin/env python3
"""Write a detector as TorchScript and ONNX: `python export.py --help`."""

import sys

from starling.cli.export import main

if __name__ == "__main__":
    sys.exit(main())
