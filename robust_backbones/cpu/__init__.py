"""What CPUs are slow at, computed in other ways of the same result."""
