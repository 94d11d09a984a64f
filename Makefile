# Forge. `make run` trains a model and serves it; `make test` runs the tests. Both set up their environments first.
SHELL := bash
.DEFAULT_GOAL := help
# More arguments for the command behind a target: make run ARGS="--data-path rows.jsonl --recipe my.yaml"
ARGS ?=
Q ?= NL: 20 juni 1969
export Q
BIN := .venv/bin
# The cluster: the registry of its images, their revision, and the Flyte project and domain.
REGISTRY ?=
TAG ?= $(shell git describe --always --abbrev=12 --match= --dirty)
PROJECT ?= homelab
DOMAIN ?= development
PACKAGE ?= .forge/package.tgz
IMAGES = --image pipeline=$(REGISTRY)/forge-pipeline:$(TAG) --image trainer=$(REGISTRY)/forge-trainer:$(TAG)
# Test files run in parallel; the tests of one file in order, since they share what the file has set up.
PARALLEL ?= -n 3 --dist loadfile --no-loadscope-reorder
# What `make test-unit` runs.
UNIT ?= tests/test_house.py tests/capacity tests/cluster tests/core tests/images tests/summary
NEEDS_REGISTRY := { [ -n "$(REGISTRY)" ] || { echo "Give the images' registry: make $(MAKECMDGOALS) REGISTRY=registry.example.org/team" >&2; exit 1; }; }
NEEDS_SETUP := { [ -x $(BIN)/forge ] || { echo "Nothing is set up yet: make run" >&2; exit 1; }; }

.PHONY: help setup .venv .venv-serving .venv-trl .venv-harness .venv-docs run ask ui status start stop doctor images package register try execute infra-check test test-unit test-long lint docs bench-preprocess bench-finetune bench-evaluate bench-register bench-rollout bench-scaling bench-overhead lock clean

help: ## List the targets
	@grep -hE '^[a-z.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: ## Build .venv and .venv-serving from the locks under images/, unless they are up to date
	@$(MAKE) --no-print-directory -j2 .venv .venv-serving

.venv:
	@images/install .venv images/development

.venv-serving:
	@images/install .venv-serving images/serving

.venv-trl:
	@images/install .venv-trl benchmarks/trl

.venv-docs:
	@images/install .venv-docs images/docs

.venv-harness: ## Install lm-evaluation-harness, for evaluation.harness_tasks
	@images/install .venv-harness images/harness

run: setup ## Run the pipeline: preprocess, train, evaluate, register, serve (ARGS="--recipe my.yaml")
	@exec $(BIN)/forge run $(ARGS)

ask: ## Ask the served model one question: make ask Q="NL: 20 juni 1969"
	@$(NEEDS_SETUP) && exec $(BIN)/forge ask $(ARGS) "$$Q"

ui: setup ## Open MLflow's UI on the embedded registry
	@exec $(BIN)/forge ui $(ARGS)

status: ## Show what serves now
	@$(NEEDS_SETUP) && exec $(BIN)/forge status $(ARGS)

start: ## Serve again after `make stop` or a reboot
	@$(NEEDS_SETUP) && exec $(BIN)/forge start $(ARGS)

stop: ## Stop serving on this machine
	@$(NEEDS_SETUP) && exec $(BIN)/forge stop $(ARGS)

doctor: setup ## Check that this machine has what a run needs
	@exec $(BIN)/forge doctor $(ARGS)

images: ## Build and push the cluster's images: make images REGISTRY=registry.example.org/team
	@images/build "$(REGISTRY)" "$(TAG)"

package: setup ## Serialize the workflows into PACKAGE, offline: make package REGISTRY=...
	@$(NEEDS_REGISTRY) && mkdir -p "$(dir $(PACKAGE))"
	@$(BIN)/pyflyte --pkgs workflows package $(IMAGES) --force --output "$(PACKAGE)"

register: setup ## Register the workflows with Flyte: make register REGISTRY=... DOMAIN=production ARGS="--dry-run"
	@$(NEEDS_REGISTRY)
	@case "$(DOMAIN)$(TAG)" in production*-dirty) echo "The working tree has uncommitted changes: commit them, then make register" >&2; exit 1;; esac
	@exec $(BIN)/pyflyte register --project $(PROJECT) --domain $(DOMAIN) --version $(TAG) --non-fast $(IMAGES) $(ARGS) workflows

try: setup ## Run the working tree's code on a cluster, in existing images: make try REGISTRY=... TAG=... ARGS="--recipe ..."
	@$(NEEDS_REGISTRY)
	@case "$(TAG)" in *-dirty) echo "Uncommitted changes have no images. Give the revision of the images to run in: make try TAG=$$(git rev-parse --short=12 HEAD)" >&2; exit 1;; esac
	@exec $(BIN)/pyflyte run --remote --copy all --project $(PROJECT) --domain $(DOMAIN) $(IMAGES) workflows/training_pipeline.py training_pipeline $(ARGS)

execute: ## Start an execution of executions/ with flytectl: make execute JOB=nightly_fine_tune DOMAIN=production
	@[ -f "executions/$(JOB).yaml" ] || { echo "JOB must be one of $(basename $(notdir $(wildcard executions/*.yaml)))" >&2; exit 1; }
	@command -v flytectl >/dev/null || { echo "flytectl is not on the PATH: https://www.union.ai/docs/v1/flyte/api-reference/flytectl-cli/" >&2; exit 1; }
	@mkdir -p .forge && sed "s/^version: REVISION$$/version: $(TAG)/" "executions/$(JOB).yaml" > .forge/execution.yaml
	@exec flytectl create execution --project $(PROJECT) --domain $(DOMAIN) --execFile .forge/execution.yaml $(ARGS)

infra-check: .venv ## Check the cluster's manifests without a cluster (`make test` does so too)
	@$(BIN)/python -m infra.check
	@$(BIN)/pytest -q tests/infra

test: setup ## Run the tests, but for the long ones
	$(BIN)/pytest $(PARALLEL) -m "not long" $(ARGS)

test-unit: .venv ## Run the fast tests, in under a minute
	$(BIN)/pytest $(PARALLEL) -m "not long" $(ARGS) $(UNIT)

test-long: setup .venv-harness ## Run the long tests: real servers, and interruptions at every stage
	$(BIN)/pytest $(PARALLEL) -m long $(ARGS)

lint: setup ## Run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv-docs ## Build the documentation site into site/
	.venv-docs/bin/mkdocs build --strict $(ARGS)

bench-preprocess: .venv .venv-trl ## Compare preprocessing with TRL's; ARGS="--rows 20000" for a quick run
	@exec $(BIN)/python -m benchmarks.preprocess $(ARGS)

bench-finetune: .venv .venv-trl ## Compare training with TRL's and Hugging Face's; ARGS="--precision bf16"
	@exec $(BIN)/python -m benchmarks.finetune $(ARGS)

bench-evaluate: .venv ## Compare evaluation's answers with transformers'
	@exec $(BIN)/python -m benchmarks.evaluate $(ARGS)

bench-register: .venv ## Compare pushing and fetching a package with the plain minio client
	@exec $(BIN)/python -m benchmarks.register $(ARGS)

bench-rollout: setup ## Measure adapter swaps on vLLM under load
	@exec $(BIN)/python -m benchmarks.rollout $(ARGS)

bench-overhead: setup ## Measure the pipeline's overhead over its stages' own work
	@exec $(BIN)/python -m benchmarks.overhead $(ARGS)

bench-scaling: .venv ## Compare training on two processes with one
	@exec $(BIN)/python -m benchmarks.scaling $(ARGS)

lock: setup ## Resolve the requirements under images/ and benchmarks/ again
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	  --custom-compile-command "make lock" images/uv.in -o images/uv.lock
	for folder in images/pipeline images/development images/serving images/harness images/docs benchmarks/trl; do \
	  $(BIN)/uv pip compile --quiet --upgrade --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes \
	    --no-emit-index-url --custom-compile-command "make lock" \
	    $$([ ! -f $$folder/excludes.txt ] || echo --excludes $$folder/excludes.txt) \
	    $$folder/requirements.in -o $$folder/requirements.lock || exit 1; \
	done

clean: ## Stop serving, and remove the environments and .forge/: data, models, registry
	@[ ! -x $(BIN)/forge ] || $(BIN)/forge stop
	rm -rf .forge .venv .venv-serving .venv-trl .venv-harness .venv-docs .pytest_cache .mypy_cache .ruff_cache site
