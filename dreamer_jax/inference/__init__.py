"""Generation: caches, sampling, the decoding loop and the text that streams from it."""
