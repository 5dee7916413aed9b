"""Tables and figures, drawn from run records alone."""
