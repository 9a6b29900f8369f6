"""What a config costs: parameters and FLOPs, from arithmetic on the config alone. No array, no device."""
