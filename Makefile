# Everything runs in .venv, which the first target that needs it creates.
#   make demo    prune a real photograph end to end, time it, draw the overlay
#   make test    the test suite
#   make test-matrix
#                the patch's tests on older versions of transformers too; VERSIONS="5.0.0 5.18.0" chooses
#   make test-libraries
#                tests of kernels and pruner with other instruction sets, numbers of threads, and without oneDNN
#   make test-serving
#                vLLM with pruned models, in build/vllm, an environment of its own that it makes from a lock file;
#                CASES=quick is what CI runs
#   make test-eval
#                lmms-eval with pruned models, in build/eval, a folder that pip fills from a lock file
#   make test-thorough
#                what make test leaves out because its neighbours find nearly the same
#   make lint    ruff and mypy
#   make aot     compile every kernel for every supported GPU, without one; TARGETS="sm_90 gfx942" chooses
#   make aot-changed
#                only what is not the program that its snapshot was taken of, and one in sixteen of the rest
#   make bench   microbenchmarks; without a GPU, PyTorch alone at small sizes
#   make e2e     a whole model unpruned and pruned by several methods: 3 minutes on two cores
#   make scaling cost against tokens, images and frames, and where pruning does not pay: 6 minutes on two cores
#   make serving requests a second and time to the first token of vLLM's server, unpruned and pruned, by a Python that
#                has vLLM (SERVING_PYTHON; build/vllm's if it is there): 10 minutes on two cores
#   make report  documents and pictures from bench/results; make guard compares counts with their snapshot
#   make hub-kernel
#                the kernels as Hugging Face's `kernels` loads them, in build/hub-kernel; needs no environment;
#                REPO=owner/name puts that name on the card
#   make accuracy
#                what a small model still answers with fewer tokens, by who chooses them: 10 minutes on two cores
# On a machine with a GPU, in .venv or, where there is none, in python3 with torch, triton and pytest-benchmark:
#   make gpu-first
#                the first eight minutes: is it right, same bits, and the measurements that decide what comes next;
#                one page, and RESULTS/<device>/first.json as it goes; STEPS="bits graphs" chooses
#   make gpu     everything that needs one, in parts of less than eight minutes that also run alone, and the report:
#                gpu-tests, gpu-micro-selection, gpu-micro-received, gpu-micro-reconstruction, gpu-micro-coverage,
#                gpu-micro-merge, gpu-micro-diversity,
#                gpu-micro-slot-training, gpu-micro-slots (three parts: gpu-micro-slots-kernels, -pruner and
#                -compiled), gpu-e2e-llava-1.5-7b, gpu-e2e-llava-next-7b, gpu-e2e-qwen2.5-vl-7b, gpu-scaling,
#                gpu-tower, gpu-accuracy, gpu-testbed (trains a larger test bed), gpu-serving (needs vLLM, in
#                GPU_PYTHON or in SERVING_PYTHON), gpu-report.
#                Of a tree whose commit is known and clean, a part that ran out of time goes on where it stopped: run
#                it again
#   RESULTS=folder puts results elsewhere, and copies of the documents with them; COMMIT=id names a tree that has no
#   git; GPU_PYTHON=python; SERVING_PYTHON=python
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
SERVING_PYTHON ?=
RESULTS ?= bench/results
COMMIT ?=
VERSIONS ?=
TARGETS ?=
REPO ?=
CASES ?=
STEPS ?=
OF_THIS_TREE = PYTHONPATH=.:kernels$${PYTHONPATH:+:$$PYTHONPATH}
GPU_RUN = $(OF_THIS_TREE) $(GPU_PYTHON)
GPU_PYTEST = $(GPU_RUN) -m pytest
CPU_SERVING_PYTHON = $(or $(SERVING_PYTHON),$(wildcard build/vllm/bin/python))
TABLE := --benchmark-columns=median,iqr,rounds --benchmark-sort=fullname
RECORDED = --record --results $(RESULTS) $(if $(COMMIT),--commit $(COMMIT))
# A row started just before the deadline may still compile for a minute.
RECORD = $(RECORDED) --deadline 400 $(TABLE)

# Exit code 3 means that time ran out and a later run goes on: the other parts still get their turn.
RESUMABLE = $(RECORDED) --minutes 6 || [ $$? -eq 3 ]

.PHONY: demo test test-matrix test-serving test-vllm test-eval test-libraries test-thorough lint aot aot-changed format bench e2e scaling \
        serving report guard accuracy hub-kernel clean \
        gpu gpu-check gpu-first gpu-tests gpu-micro-selection gpu-micro-received gpu-micro-reconstruction gpu-micro-coverage \
        gpu-micro-merge gpu-micro-diversity gpu-micro-slot-training gpu-micro-slots gpu-micro-slots-kernels gpu-micro-slots-pruner \
        gpu-micro-slots-compiled gpu-scaling gpu-tower gpu-accuracy gpu-testbed gpu-serving gpu-report

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2])' || \
	  { echo "ocvtp needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing ocvtp and its dependencies into $(VENV) ..."
	$(PIP_INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing ocvtp and its development dependencies into $(VENV) ..."
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/ocvtp demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --maxprocesses 8

test-matrix: $(VENV)/.dev
	$(BIN)/python -m bench.matrix $(if $(VERSIONS),--versions $(VERSIONS))

test-serving test-vllm: $(VENV)/.dev
	$(BIN)/python -m bench.vllm_environment $(if $(CASES),-- -m $(CASES))

test-eval: $(VENV)/.dev
	$(BIN)/python -m bench.eval_environment

test-libraries: $(VENV)/.dev
	$(BIN)/python -m pytest -m libraries tests/test_other_libraries.py

test-thorough: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --maxprocesses 8 -m thorough

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

aot: $(VENV)/.dev
	$(BIN)/python -W ignore -m bench.aot $(addprefix --target ,$(TARGETS))

aot-changed: $(VENV)/.dev
	$(BIN)/python -W ignore -m bench.aot --changed $(addprefix --target ,$(TARGETS))

bench: $(VENV)/.dev
	$(BIN)/python -m pytest bench/micro $(TABLE)

e2e: $(VENV)/.dev
	$(BIN)/python -m bench.e2e

scaling: $(VENV)/.dev
	$(BIN)/python -m bench.scaling

serving:
	@test -n "$(CPU_SERVING_PYTHON)" || \
	  { echo "make serving needs a Python with vLLM: make test-serving builds build/vllm, or SERVING_PYTHON=python"; exit 1; }
	$(OF_THIS_TREE) $(CPU_SERVING_PYTHON) -m bench.serving

report: $(VENV)/.dev
	$(BIN)/python -m bench.report

guard: $(VENV)/.dev
	$(BIN)/python -m bench.guard
	$(BIN)/python -m bench.flops

hub-kernel:
	$(PYTHON) -m bench.hub_kernel $(if $(REPO),--repo $(REPO))

accuracy: $(VENV)/.dev
	$(BIN)/python -m bench.accuracy

GPU_PARTS := gpu-tests gpu-micro-selection gpu-micro-received gpu-micro-reconstruction gpu-micro-coverage \
             gpu-micro-merge gpu-micro-diversity \
             gpu-micro-slot-training gpu-micro-slots gpu-e2e-llava-next-7b gpu-e2e-llava-1.5-7b gpu-e2e-qwen2.5-vl-7b \
             gpu-scaling gpu-tower gpu-accuracy gpu-testbed gpu-serving gpu-report

# A part that fails doesn't keep the others from their turn.
gpu: gpu-check
	@failed=; for part in $(GPU_PARTS); do $(MAKE) $$part || failed="$$failed $$part"; done; \
	  if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

gpu-check:
	@$(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
	  { echo "make gpu needs a CUDA GPU, and the torch of $(GPU_PYTHON) sees none. Without one: make bench"; exit 1; }

gpu-first: gpu-check
	$(GPU_RUN) -m bench.first $(RECORDED) $(addprefix --only ,$(STEPS))

gpu-tests: gpu-check
	$(GPU_PYTEST) tests/kernels tests/pruner tests/vlm/test_vlm_gpu.py tests/test_micro.py

gpu-micro-selection: gpu-check
	$(GPU_PYTEST) bench/micro/test_selection.py $(RECORD)

gpu-micro-received: gpu-check
	$(GPU_PYTEST) bench/micro/test_received_attention.py $(RECORD)

gpu-micro-reconstruction: gpu-check
	$(GPU_PYTEST) bench/micro/test_reconstruction.py $(RECORD)

gpu-micro-coverage: gpu-check
	$(GPU_PYTEST) bench/micro/test_coverage.py $(RECORD)

gpu-micro-merge: gpu-check
	$(GPU_PYTEST) bench/micro/test_merge.py $(RECORD)

gpu-micro-diversity: gpu-check
	$(GPU_PYTEST) bench/micro/test_diversity.py $(RECORD)

gpu-micro-slot-training: gpu-check
	$(GPU_PYTEST) bench/micro/test_slot_training.py $(RECORD)

gpu-micro-slots:
	$(MAKE) gpu-micro-slots-kernels
	$(MAKE) gpu-micro-slots-pruner
	$(MAKE) gpu-micro-slots-compiled

gpu-micro-slots-kernels: gpu-check
	$(GPU_PYTEST) bench/micro/test_slot_attention.py -k 'top_tokens and not compiled' $(RECORD)

gpu-micro-slots-pruner: gpu-check
	$(GPU_PYTEST) bench/micro/test_slot_attention.py -k 'pruner and not compiled' $(RECORD)

gpu-micro-slots-compiled: gpu-check
	$(GPU_PYTEST) bench/micro/test_slot_attention.py -k compiled $(RECORD)

gpu-e2e-%: gpu-check
	$(GPU_RUN) -m bench.e2e --preset $* $(RESUMABLE)

gpu-scaling: gpu-check
	$(GPU_RUN) -m bench.scaling $(RESUMABLE)

gpu-tower: gpu-check
	$(GPU_RUN) -m bench.tower --shape clip-l-336 --shape qwen2.5-vl --seconds 20 $(RECORDED)

gpu-report:
	$(GPU_RUN) -m bench.report $(if $(filter-out bench/results,$(RESULTS)),--results $(RESULTS) --into $(RESULTS)/report)

gpu-accuracy: gpu-check
	$(GPU_RUN) -m bench.accuracy --device cuda --no-document $(RECORDED)

gpu-serving: gpu-check
	$(OF_THIS_TREE) $(or $(SERVING_PYTHON),$(GPU_PYTHON)) -m bench.serving --preset llava-1.5-7b $(RESUMABLE)

gpu-testbed: gpu-check
	$(GPU_RUN) -m bench.testbed train --recipe bench/testbed/recipe-large.json --out build/testbed-large \
	  --device cuda --workers 12 --minutes 7 $(if $(COMMIT),--commit $(COMMIT))

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache
