"""Experiments that anyone can run again: the laboratory and the benchmarks."""
