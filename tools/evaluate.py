#!/usr/bin/env python
"""The command in robust_backbones/commands/evaluate.py, as a script."""

from robust_backbones.commands import cli, evaluate

if __name__ == "__main__":
    cli.run(evaluate.main)
