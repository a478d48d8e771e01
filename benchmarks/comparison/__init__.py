"""What benchmarks/methods.py does: which runs it makes, what they cost, and how it shows them."""
