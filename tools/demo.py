#!/usr/bin/env python
"""The command in robust_backbones/commands/demo.py, as a script."""

from robust_backbones.commands import cli, demo

if __name__ == "__main__":
    cli.run(demo.main)
