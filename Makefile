# `make` is the tour and `make help` lists the rest.
PYTHON ?= python3
python := .venv/bin/python
installed := .venv/.installed
developed := .venv/.developed

.PHONY: tour full vae vae_dynamic vae_zdim2 gan nf nf_mixture nf_mixture_n_mix1 measure report \
  test bench clean help
.DEFAULT_GOAL := tour

tour: $(installed)  ## train all three briefly, into results/tour (the default)
	@echo "The tour trains all three briefly, which takes about five minutes on two cores."
	$(python) a3_vae_template.py --epochs 10 --results_dir results/tour/vae
	$(python) a3_nf_template.py --epochs 2 --results_dir results/tour/nf
	$(python) a3_gan_template.py --n_epochs 10 --results_dir results/tour/gan
	@echo
	@echo "The tour is over. Look at its pictures:"
	@ls results/tour/*/samples_after.png results/tour/*/elbo.png results/tour/*/bpd.png \
	  results/tour/*/training.png results/tour/*/interpolation.png | sed 's/^/  /'
	@echo "and at those of the full runs in results/*/. To go on:"
	@echo "  make full    trains all at full length, measures them and builds the report"
	@echo "  make help    lists everything else"

# Side by side, as under `make -j2`, trainings are fastest with a thread each.
train = $(if $(filter-out -j1,$(filter -j%,$(MAKEFLAGS))),OMP_NUM_THREADS=1) $(python)

runs := vae vae_dynamic vae_zdim2 gan nf_mixture nf_mixture_n_mix1 nf

full: $(runs)  ## train everything at full length, into results/, measure it and build the report
	$(MAKE) measure
	$(MAKE) report

vae: $(installed)  ## the VAE with 20 latent dimensions
	$(train) a3_vae_template.py

vae_dynamic: $(installed)  ## the same on images binarized anew each epoch
	$(train) a3_vae_template.py --binarization dynamic

vae_zdim2: $(installed)  ## the VAE with 2 latent dimensions
	$(train) a3_vae_template.py --zdim 2

gan: $(installed)  ## the GAN
	$(train) a3_gan_template.py

nf: $(installed)  ## the flow
	$(train) a3_nf_template.py

nf_mixture: $(installed)  ## the flow with mixture couplings
	$(train) extension/mixture_flow.py

nf_mixture_n_mix1: $(installed)  ## the same networks with affine couplings
	$(train) extension/mixture_flow.py --n_mix 1

# The weights of nf, the last one, are not in git: a fresh clone measures all but these.
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
	@sed -n 's/^\([a-z_0-9]*\):.*## /\1 /p' Makefile | \
	  while read -r name what; do printf '%-18s %s\n' "$$name" "$$what"; done

# An environment works only where it was made; in a copied or moved folder it is made anew.
ifeq ($(shell grep -sF '$(CURDIR)/.venv' .venv/bin/activate),)
.PHONY: .venv $(installed) $(developed)
endif

.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "error: this needs Python 3.10 or newer, which $(PYTHON) is not; make PYTHON=..." >&2; exit 1; }
	@rm -rf .venv
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "error: $(PYTHON) -m venv does not work; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }

$(installed): requirements.txt | .venv
	@echo "Installing PyTorch and the rest into .venv: about a minute, and 6 GB."
	@$(python) -m pip install --quiet -r requirements.txt
	@touch $@

$(developed): tests/requirements-dev.txt $(installed)
	@$(python) -m pip install --quiet -r tests/requirements-dev.txt
	@touch $@
