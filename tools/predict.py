#!/usr/bin/env python
"""The command in robust_backbones/commands/predict.py, as a script."""

from robust_backbones.commands import cli, predict

if __name__ == "__main__":
    cli.run(predict.main)
