"""Side-by-side measurements: each measures both sides in one run and prints a ratio. None is a timed test."""
