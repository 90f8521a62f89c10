"""`mogeo demo`: four objectives that conflict, on a small world that generates itself. Nothing else may import it."""
