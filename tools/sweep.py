#!/usr/bin/env python
"""The command in robust_backbones/sweep/command.py, as a script."""

from robust_backbones.commands import cli
from robust_backbones.sweep import command

if __name__ == "__main__":
    cli.run(command.main)
