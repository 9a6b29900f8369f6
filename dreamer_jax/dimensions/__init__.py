"""The sections of the config, one an attention dimension: keys, weights, costs. No JAX here."""
