"""What a run leaves on disk, and how the processes of a run work together."""
