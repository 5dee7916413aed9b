"""What tools/benchmark.py measures: one module a kind of work, and the ways to do it that take turns."""
