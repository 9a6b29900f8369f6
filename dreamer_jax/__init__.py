"""Dreamer: depth-recurrent attention mixtures in JAX (arXiv 2601.21582)."""
