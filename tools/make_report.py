#!/usr/bin/env python
"""The command in robust_backbones/commands/report.py, as a script."""

from robust_backbones.commands import cli, report

if __name__ == "__main__":
    cli.run(report.main)
