#!/usr/bin/env python
"""The command in robust_backbones/commands/convert.py, as a script."""

from robust_backbones.commands import cli, convert

if __name__ == "__main__":
    cli.run(convert.main)
