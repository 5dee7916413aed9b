#!/usr/bin/env python
"""The command in robust_backbones/commands/train.py, as a script."""

from robust_backbones.commands import cli, train

if __name__ == "__main__":
    cli.run(train.main)
