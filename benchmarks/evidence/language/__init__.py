"""LA, DR and DR+DA of equal cost on mathematics in words, with ablations of DR+DA (docs/evidence.md).

python -m benchmarks.evidence.language --data DIR --out DIR
"""
