#!/usr/bin/env python
"""The command in robust_backbones/commands/pretrain.py, as a script."""

from robust_backbones.commands import cli, pretrain

if __name__ == "__main__":
    cli.run(pretrain.main)
