"""From raw instruction sets to clean documents: no reasoning traces, no duplicates, no questions of benchmarks."""
