# The commands CI and contributors use; the README's two commands do the same without make.
PYTHON = .venv/bin/python

.venv/bin/python:
	python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[dev]'

.PHONY: test check gpu run docs docs-write docs-check
test: .venv/bin/python  ## the whole suite, CPU only
	$(PYTHON) -m pytest
check: .venv/bin/python  ## lint and types
	.venv/bin/ruff check && .venv/bin/mypy
gpu: .venv/bin/python  ## the tests that need a CUDA device
	$(PYTHON) -m pytest -m gpu
run: .venv/bin/python  ## the main job on the embedded model
	.venv/bin/sparsekit run recipes/ast_gptq4.yaml

COG = .venv/bin/cog -I scripts -p "import cog, figures, generated, headlines"
PAGES = README.md docs/*.md docs/methods/*.md docs/benchmarks/*.md plugins/*.md

docs-write: .venv/bin/python  ## write the generated parts of the docs anew
	$(COG) -r $(PAGES)
docs-check: .venv/bin/python  ## fail when a generated part is stale
	$(COG) --check $(PAGES)
.venv/bin/zensical: .venv/bin/python
	.venv/bin/pip install -q -c constraints.txt -e '.[docs]'
docs: .venv/bin/zensical  ## build the site into site/
	.venv/bin/zensical build --strict

.PHONY: bench
bench: .venv/bin/python  ## SparseGPT and GPTQ of one block beside the papers' recursion; BENCH=--small on a CPU
	.venv/bin/sparsekit bench $(BENCH)

.PHONY: interop
interop: .venv/bin/python  ## exports read by auto-gptq, gptqmodel, compressed-tensors and vLLM; 10 GB of environments
	$(PYTHON) tests/interop/run.py $(if $(READER),--only $(READER)) $(if $(MODEL),--model $(MODEL))
