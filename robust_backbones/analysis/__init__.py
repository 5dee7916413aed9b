"""Tables and figures, made from run records alone."""
