"""The command lines, one module per verb."""
