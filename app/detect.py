#!/usr/bin/env python3
"""Find objects in images, videos and streams: `python detect.py --help`."""

import sys

from starling.cli.detect import main

if __name__ == "__main__":
    sys.exit(main())
