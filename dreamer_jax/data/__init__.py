"""Data: documents to prepared datasets, and prepared datasets to batches."""
