"""Benchmarks: every case names its opponent, checks that both computed the same, and prints one kind of row."""
