# The commands CI and contributors use; the README's two commands do the same without make.
PYTHON = .venv/bin/python

.venv/bin/python:
	python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[dev]'

.PHONY: test check gpu run
test: .venv/bin/python  ## the whole suite, CPU only
	$(PYTHON) -m pytest
check: .venv/bin/python  ## lint and types
	.venv/bin/ruff check && .venv/bin/mypy
gpu: .venv/bin/python  ## the tests that need a CUDA device
	$(PYTHON) -m pytest -m gpu
run: .venv/bin/python  ## the main job on the embedded model
	.venv/bin/sparsekit run recipes/ast_gptq4.yaml
