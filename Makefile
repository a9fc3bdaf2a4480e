# `make` is the tour and `make help` lists the rest.
PYTHON ?= python3
python := .venv/bin/python
installed := .venv/.installed
developed := .venv/.developed

# The runs that the report needs, and the commands that train them.
vae := a3_vae_template.py
vae_dynamic := a3_vae_template.py --binarization dynamic
vae_zdim2 := a3_vae_template.py --zdim 2
gan := a3_gan_template.py
nf := a3_nf_template.py
nf_mixture := extension/mixture_flow.py
runs := vae vae_dynamic vae_zdim2 gan nf nf_mixture

.PHONY: tour full $(runs) measure report test bench clean help
.DEFAULT_GOAL := tour

tour: $(installed)  ## train all three briefly, into results/tour (the default)
	@echo "The tour trains all three briefly, which takes five to eight minutes on two cores."
	$(python) a3_vae_template.py --epochs 5 --results_dir results/tour/vae
	$(python) a3_nf_template.py --epochs 3 --results_dir results/tour/nf
	$(python) a3_gan_template.py --n_epochs 10 --results_dir results/tour/gan
	@echo "The tour is over. Look at its pictures in results/tour/*/, above all at samples_after.png,"
	@echo "and at those of the full runs in results/*/. To go on:"
	@echo "  make full    trains all at full length, measures them and builds the report"
	@echo "  make help    lists everything else"

full: $(runs)  ## train everything at full length, into results/, measure it and build the report
	$(MAKE) measure
	$(MAKE) report

# Side by side, as under `make -j2`, trainings are fastest with a thread each.
$(runs): $(installed)
	$(if $(filter-out -j1,$(filter -j%,$(MAKEFLAGS))),OMP_NUM_THREADS=1) $(python) $($@)

measure: $(installed)  ## what the report says of the trained models, into results/*/measures.json
	$(python) report/measure.py $(addprefix results/,$(runs))

report:  ## report/report.pdf from the figures and numbers in results/ (needs LaTeX)
	$(MAKE) -C report

test: $(developed)  ## lint and tests
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m pytest -q

bench: $(developed)  ## how far each training step is from what the machine can do
	$(python) benchmarks/benchmark.py

clean:  ## remove the environment, the tour and what tests and builds leave behind
	rm -rf .venv results/tour .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
	$(MAKE) -C report clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1 /p' Makefile | \
	  while read -r name what; do printf '%-9s %s\n' "$$name" "$$what"; done
	@echo "$(runs): one training each"

# An environment works only where it was made; in a copied or moved folder it is made anew.
ifeq ($(shell grep -sF '$(CURDIR)/.venv' .venv/bin/activate),)
.PHONY: .venv $(installed) $(developed)
endif

.venv:
	@$(PYTHON) -m venv --clear .venv || { rm -rf .venv; \
	  echo "error: on Debian or Ubuntu, apt-get install python3-venv; else make PYTHON=..." >&2; exit 1; }

$(installed): requirements.txt | .venv
	@echo "Installing PyTorch and the rest into .venv: about a minute, and 6 GB."
	@$(python) -m pip install --quiet -r requirements.txt
	@touch $@

$(developed): tests/requirements-dev.txt $(installed)
	@$(python) -m pip install --quiet -r tests/requirements-dev.txt
	@touch $@
