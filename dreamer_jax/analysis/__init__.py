"""What a model does with its depths and experts: captures (sums over many sequences), figures, a report."""
