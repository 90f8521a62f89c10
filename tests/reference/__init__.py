"""Slow, independent oracles, written for clarity: what the product must agree with. None of them imports mogeo."""
