"""Checkpoints of this project as models of the lm-evaluation-harness, and its tasks over local files."""
