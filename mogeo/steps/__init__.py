"""How one step is made, from its first backward to its direction: one file per way, and one place that chooses.

Must not know the optimizer, nor what becomes of the direction.
"""
