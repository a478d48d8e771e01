"""benchmarks/methods.py: its plan, its results and its tables."""
