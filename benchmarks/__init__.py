"""Benchmarks and offline proofs; each question is one file, run as `python -m benchmarks.<question>`."""
