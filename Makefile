# All checks of the project: make check
.PHONY: check exhaustive format test
check:
	ruff check .
	ruff format --check .
	mypy
	python -m pytest -n 2 --dist loadgroup
format:
	ruff check --fix .
	ruff format .
test:
	python -m pytest -n 2 --dist loadgroup
# Before a release, and after a change of kernels or of numerics: CONTRIBUTING.md.
exhaustive:
	python -m pytest -n 2 --dist loadgroup -m ""
