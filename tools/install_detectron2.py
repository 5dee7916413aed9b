#!/usr/bin/env python
"""The installer in robust_backbones/commands/install_detectron2.py, as a script."""

import sys

from robust_backbones.commands import install_detectron2

if __name__ == "__main__":
    sys.exit(install_detectron2.main(sys.argv[1:]))
