"""One HTML page that compares runs: what it reads, its tables, its figures."""
