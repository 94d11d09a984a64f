# Forge. `make run` trains a model and serves it; `make test` runs the tests. Both do their own set-up.
SHELL := bash
.DEFAULT_GOAL := help
# Extra arguments of the pipeline: make run ARGS="--data_path rows.jsonl --recipe my.yaml"
ARGS ?=
Q ?= NL: 20 juni 1969
export Q
BIN := .venv/bin
# On a cluster: where its images are, which revision they are of, and what is registered where.
REGISTRY ?=
TAG ?= $(shell git describe --always --abbrev=12 --match= --dirty)
PROJECT ?= homelab
DOMAIN ?= development
PACKAGE ?= .forge/package.tgz
IMAGES = --image pipeline=$(REGISTRY)/forge-pipeline:$(TAG) --image trainer=$(REGISTRY)/forge-trainer:$(TAG)
NEEDS_REGISTRY := { [ -n "$(REGISTRY)" ] || { echo "Say where the images are: make $(MAKECMDGOALS) REGISTRY=registry.example.org/team" >&2; exit 1; }; }
NEEDS_SETUP := { [ -f .venv/.installed ] || { echo "Nothing is set up yet: make run" >&2; exit 1; }; }

.PHONY: help setup .venv .venv-serving .venv-trl .venv-harness run ask ui start stop images package register try execute infra-check test test-long lint bench-preprocess bench-finetune bench-evaluate bench-register bench-rollout bench-scaling bench-overhead lock clean

help: ## List the targets
	@grep -hE '^[a-z.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: ## Build .venv and .venv-serving from the locks under images/ (nothing is done twice)
	@$(MAKE) --no-print-directory -j2 .venv .venv-serving

.venv:
	@images/install .venv images/development

.venv-serving:
	@images/install .venv-serving images/serving

.venv-trl:
	@images/install .venv-trl benchmarks/trl

.venv-harness: ## Install lm-evaluation-harness, for evaluation.harness_tasks
	@images/install .venv-harness images/harness

run: setup ## Preprocess, train, evaluate, register and serve: the whole pipeline, ARGS="..." for its inputs
	@exec $(BIN)/pyflyte run workflows/training_pipeline.py training_pipeline $(ARGS)

ask: ## Ask the served model one question: make ask Q="NL: 20 juni 1969"
	@$(NEEDS_SETUP) && $(BIN)/python -m forge.serving ask "$$Q"

ui: setup ## Open MLflow's UI on the embedded registry
	@exec $(BIN)/python -m tasks.register ui

start: ## Serve again what `make stop`, or a reboot, has stopped
	@$(NEEDS_SETUP) && $(BIN)/python -m forge.serving start

stop: ## Stop the server that `make run` left serving
	@$(NEEDS_SETUP) && $(BIN)/python -m forge.serving stop

images: ## Build the images and push them: make images REGISTRY=registry.example.org/team
	@images/build "$(REGISTRY)" "$(TAG)"

package: setup ## Serialise all that runs on Flyte into PACKAGE, offline: make package REGISTRY=...
	@$(NEEDS_REGISTRY) && mkdir -p "$(dir $(PACKAGE))"
	@$(BIN)/pyflyte --pkgs workflows package $(IMAGES) --force --output "$(PACKAGE)"

register: setup ## Register it with Flyte: make register REGISTRY=... DOMAIN=production ARGS="--dry-run"
	@$(NEEDS_REGISTRY)
	@case "$(DOMAIN)$(TAG)" in production*-dirty) echo "The tree has changes that are in no revision: commit them, then make register" >&2; exit 1;; esac
	@exec $(BIN)/pyflyte register --project $(PROJECT) --domain $(DOMAIN) --version $(TAG) --non-fast $(IMAGES) $(ARGS) workflows

try: setup ## Run your tree's code on a cluster, in images that are there: make try REGISTRY=... TAG=... ARGS="--recipe ..."
	@$(NEEDS_REGISTRY)
	@case "$(TAG)" in *-dirty) echo "No images are of a tree with changes. Say which revision's to run in: make try TAG=$$(git rev-parse --short=12 HEAD)" >&2; exit 1;; esac
	@exec $(BIN)/pyflyte run --remote --copy all --project $(PROJECT) --domain $(DOMAIN) $(IMAGES) workflows/training_pipeline.py training_pipeline $(ARGS)

execute: ## Start a job of executions/ by flytectl: make execute JOB=nightly_fine_tune DOMAIN=production
	@[ -f "executions/$(JOB).yaml" ] || { echo "JOB must be one of $(basename $(notdir $(wildcard executions/*.yaml)))" >&2; exit 1; }
	@command -v flytectl >/dev/null || { echo "flytectl is not on the PATH: https://www.union.ai/docs/v1/flyte/api-reference/flytectl-cli/" >&2; exit 1; }
	@mkdir -p .forge && sed "s/^version: REVISION$$/version: $(TAG)/" "executions/$(JOB).yaml" > .forge/execution.yaml
	@exec flytectl create execution --project $(PROJECT) --domain $(DOMAIN) --execFile .forge/execution.yaml $(ARGS)

infra-check: .venv ## Check the cluster's manifests, as far as that goes without a cluster (test does, too)
	@$(BIN)/python -m infra.check
	@$(BIN)/pytest -q tests/infra

test: setup ## The tests that one runs before every commit
	$(BIN)/pytest -m "not long"

test-long: setup .venv-harness ## The tests that take longer: interruptions at every stage
	$(BIN)/pytest -m long

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-preprocess: .venv .venv-trl ## Measure preprocessing against TRL's; ARGS="--rows 20000" for a quick look
	@exec $(BIN)/python -m benchmarks.preprocess $(ARGS)

bench-finetune: .venv .venv-trl ## Measure training against TRL's and Hugging Face's; ARGS="--precision bf16" for half
	@exec $(BIN)/python -m benchmarks.finetune $(ARGS)

bench-evaluate: .venv ## Measure evaluation's answers against transformers'
	@exec $(BIN)/python -m benchmarks.evaluate $(ARGS)

bench-register: .venv ## Measure pushing and fetching a package against the plain minio client
	@exec $(BIN)/python -m benchmarks.register $(ARGS)

bench-rollout: setup ## Measure swaps of adapters on vLLM while clients keep asking
	@exec $(BIN)/python -m benchmarks.rollout $(ARGS)

bench-overhead: setup ## Measure what the pipeline takes beside its stages' own work
	@exec $(BIN)/python -m benchmarks.overhead $(ARGS)

bench-scaling: .venv ## Measure training on two processes against one
	@exec $(BIN)/python -m benchmarks.scaling $(ARGS)

lock: setup ## Resolve the requirements under images/ and benchmarks/ again
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	  --custom-compile-command "make lock" images/uv.in -o images/uv.lock
	for folder in images/pipeline images/development images/serving images/harness benchmarks/trl; do \
	  $(BIN)/uv pip compile --quiet --upgrade --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes \
	    --no-emit-index-url --custom-compile-command "make lock" --excludes $$folder/excludes.txt \
	    $$folder/requirements.in -o $$folder/requirements.lock || exit 1; \
	done

clean: ## Stop serving and remove what runs and set-up left (environments, models, registry)
	@[ ! -f .venv/.installed ] || $(BIN)/python -m forge.serving stop
	rm -rf .forge .venv .venv-serving .venv-trl .venv-harness .pytest_cache .mypy_cache .ruff_cache
