#!/usr/bin/env python
"""The command in robust_backbones/commands/transfer.py, as a script."""

from robust_backbones.commands import cli, transfer

if __name__ == "__main__":
    cli.run(transfer.main)
