"""Studies of many runs: a manifest becomes a graph of runs, which is launched, watched and collected."""
