#!/usr/bin/env python
"""The command in robust_backbones/commands/inheritance.py, as a script."""

from robust_backbones.commands import cli, inheritance

if __name__ == "__main__":
    cli.run(inheritance.main)
