"""Benchmarks: their files, what they ask, and what answers are worth. A benchmark is one file, listed in tasks.py."""
