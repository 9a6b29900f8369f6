"""From raw instruction sets to prepared data: no reasoning traces, no duplicates, no questions of benchmarks."""

import os

os.environ.setdefault("DO_NOT_TRACK", "true")  # or daft reports its use to its makers, from its import on
