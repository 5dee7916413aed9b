#!/usr/bin/env python
"""The command in robust_backbones/commands/visualize.py, as a script."""

from robust_backbones.commands import cli, visualize

if __name__ == "__main__":
    cli.run(visualize.main)
