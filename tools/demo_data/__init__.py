"""Synthetic datasets: seeded samples of an invented world, for the demo and the benchmarks."""
