"""The paper's comparison of methods, on what a CPU can do. `python benchmarks/alignment --help` says how to run it."""
