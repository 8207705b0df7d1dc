# Every target but `clean` builds the environment it needs from the pins in requirements.txt.

PYTHON ?= python3
CORES ?= all
COUNT ?= 10000
BIN := .venv/bin

.PHONY: reproduce paper check test hardening cluster fuzz docs zoo lab clean

reproduce: .venv/.complete ## every notebook on the embedded digits: tables, figures, executed notebooks, HTML
	$(BIN)/kmex batch config/quick.yaml --cores $(CORES)

paper: .venv/.complete ## the paper's three data sets, five seeds; prints what they will take and starts (Ctrl-C stops)
	$(BIN)/kmex estimate config/paper.yaml
	$(BIN)/kmex batch config/paper.yaml --cores $(CORES)

check: .venv/.complete ## before a commit: format, lint, types, unit tests; two minutes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not (notebook or batch or browser or hardening or slow)"

test: .venv/.complete ## everything: as check, with notebooks, workflow and browser; a third process works while two wait
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

hardening: .venv/.complete ## 50 kills of the batch, 20 of the export, 10 full disks at random moments; prints counts and minutes
	OMP_NUM_THREADS=1 KMEX_HARDENING="50 20 10" $(BIN)/python -m pytest -s -m hardening tests/test_hardening.py

cluster: .venv/.complete ## the embedded digits on a SLURM cluster of two nodes made on this machine, one of which is lost
	KMEX_CLUSTER=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_cluster.py

fuzz: .venv/.complete ## mutated image files of every format, COUNT of them from SEED on: read, or refused in one line; a minute
	PYTHONPATH=. $(BIN)/python tests/fuzz_images.py --count $(COUNT) --seed $(or $(SEED),0)

zoo: .venv/.complete ## which of some 400 networks of torchvision and timm fit, checked independently; resumes where it stopped
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/architectures.py --csv runs/architectures.csv --jobs 2
	$(BIN)/python benchmarks/architectures.py --csv runs/architectures.csv --families

docs: reproduce ## the site, docs/_build/html/index.html, with the notebooks as they ran; warnings are errors
	$(BIN)/kmex batch config/quick.yaml extras --cores $(CORES)
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

lab: .venv/.complete ## step through the notebooks
	$(BIN)/jupyter lab notebooks

.venv/.complete: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 …"; exit 1; }
	@echo "Installing the pinned environment into .venv: a few minutes, several GB on Linux (PyTorch brings CUDA)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --progress-bar on --no-compile -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

clean: ## results (not the environment, not the committed figures)
	rm -rf runs .snakemake
