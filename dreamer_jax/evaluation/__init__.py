"""Evaluation: benchmarks, what they ask of a model, how answers are scored, and what the scores mean."""
