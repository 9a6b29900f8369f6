# All checks of the project: make check
.PHONY: check format test
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
