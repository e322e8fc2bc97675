# The Pythons that the pinned Airflow supports, newest first.
PYTHON_VERSIONS := 3.14 3.13 3.12 3.11
# Older Airflows that the DAGs also run on.
OLDER_AIRFLOWS := 3-2 3-1
PYTHON ?= $(firstword $(foreach version,$(PYTHON_VERSIONS),\
	$(shell python$(version) -c 'print("python$(version)")' 2>/dev/null)) python3)

# All commands except `preflight` use only the emulator, whatever account the shell's variables name.
ifneq ($(MAKECMDGOALS),preflight)
unexport $(filter AIRFLOW_% AWS_% POLARS_CLOUD_%,$(.VARIABLES))
endif
export AIRFLOW_HOME := $(CURDIR)/.airflow
export PYTHONPATH := $(CURDIR):$(CURDIR)/emulator:$(CURDIR)/plugins
export UV_CACHE_DIR := $(CURDIR)/.venv/cache
# Compile once, at installation: Airflow then starts in half the time.
export UV_COMPILE_BYTECODE := 1
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo emulator airflow copy preflight check test \
	test-template test-failures test-versions test-celery test-mutations wheel lint lock outdated \
	bench bench-calls bench-comparison bench-load bench-waiting clean

help: ## List the commands
	@awk -F ':.*## ' '/^##@ / { print "\n" substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

##@ Run it

demo: .venv/installed ## Run the DAGs, or DAG=multi_stage; OPEN=1 serves the emulator's page, REALISTIC=1 simulates slow starts
	@.venv/bin/python scripts/demo.py $(DAG) $(ROWS:%=--rows=%) $(if $(OPEN),--open) \
		$(if $(REALISTIC),--realistic)

emulator: .venv/installed ## Serve the emulator until Ctrl-C
	.venv/bin/python -m polars_cloud_emulator serve --state-dir .emulator --env-file .emulator/env

airflow: PORT := 8080
airflow: .venv/installed ## Serve Airflow with the DAGs, and the emulator, until Ctrl-C
	.venv/bin/python scripts/standalone.py --port $(PORT)

##@ Write your own DAGs

# The DAG runs while its file is checked, because each takes a core. Errors in the file are reported
# first, its style last.
check: .venv/installed ## Lint and run a DAG, and show its results: DAG=multi_stage ROWS=20; all DAGs without DAG=
	@output=$$(mktemp); \
	.venv/bin/python scripts/demo.py $(DAG) $(ROWS:%=--rows=%) >$$output 2>&1 & run=$$!; \
	trap 'kill $$run 2>/dev/null; wait $$run; rm -f $$output' EXIT; trap 'exit 130' INT TERM; \
	.venv/bin/python -m pytest -q --no-header --exitfirst -rN --tb=short --numprocesses=0 \
		tests/test_dag_integrity.py $(DAG:%=--dag=%) && \
	.venv/bin/python -m ruff check --quiet --select E9,F $(CHECKED) || exit 1; \
	wait $$run; code=$$?; cat $$output; exit $$code
	@{ .venv/bin/python -m ruff check $(CHECKED) && .venv/bin/python -m ruff format --check $(CHECKED); } || \
		{ echo 'The DAG runs, but its style needs correction. Begin with:' \
			'.venv/bin/ruff format dags include; .venv/bin/ruff check --fix dags include' >&2; exit 1; }

check: CHECKED = $(if $(DAG),$(DAG:%=dags/%.py),dags) include plugins

##@ Use your own Airflow and account

# Uses the shell's Connection and variables, unchanged.
preflight: .venv/installed ## Check your account; SPEND=1 also starts a cluster; EMULATOR=1 checks the emulator instead
	.venv/bin/python scripts/preflight.py $(if $(EMULATOR),--emulator) $(if $(SPEND),--spend)

copy: .venv/installed ## Copy or upgrade a DAG in another Airflow: DAG=complete_pipeline TO=/path; DIFF=1 shows changes
	@.venv/bin/python scripts/copy_dag.py "$(DAG)" "$(TO)" $(if $(DIFF),--diff)

##@ Test

# Three processes on two cores, because tests wait part of the time. Work-stealing splits the tests
# of a file, which is faster because their shared fixtures are created quickly.
test: .venv/installed ## Test the DAGs, include/ and the library
	.venv/bin/python -m pytest --numprocesses=3 --dist=worksteal

test-template: .venv/installed ## Test the emulator, the pages, the scripts and the layouts
	.venv/bin/python -m pytest emulator/tests tests/template

test-failures: .venv/installed ## Inject failures under a real scheduler; ALL=1 does so for each DAG
	.venv/bin/python -m pytest tests/failures --dist=worksteal $(if $(ALL),,-m 'not further')

# Another release, such as the newest, is installed without a lock.
ifdef AIRFLOW
test-versions: .venv/installed
	.venv/bin/uv venv --quiet --clear --python .venv/bin/python .venv/airflow-$(AIRFLOW)
	.venv/bin/uv pip install --quiet --python .venv/airflow-$(AIRFLOW) --no-build \
		apache-airflow==$(AIRFLOW) --requirements requirements.txt --group emulator --group tests
	for tests in tests/test_internals.py 'tests/failures -m any_airflow'; do \
		.venv/airflow-$(AIRFLOW)/bin/python -m pytest $$tests --dist=load -W default || exit; \
	done
else
test-versions: wheel $(OLDER_AIRFLOWS:%=.venv/airflow-%/installed) ## Run the DAGs, and some failures, on older Airflows; AIRFLOW=3.4.0 tests another release
	for version in $(OLDER_AIRFLOWS); do \
		.venv/airflow-$$version/bin/python -m pytest tests/failures --dist=load \
			-m 'any_airflow or deferred' -W default || exit; \
		.venv/airflow-$$version/bin/python -m pytest --numprocesses=0 -W default \
			tests/test_page.py || exit; \
	done
	.venv/bin/uv pip install --quiet --no-deps --target .venv/wheel/site \
		.venv/wheel/airflow_polars_remote-*.whl
	.venv/bin/python -m pytest -q --numprocesses=0 tests/wheel
endif

test-celery: .venv/installed ## Run the DAGs on two Celery workers; needs redis-server
	.venv/bin/python -m pytest tests/celery --numprocesses=0

test-mutations: .venv/installed ## Break each promise in the code, and list the breaks that no test notices; WORDS=... selects some
	.venv/bin/python scripts/mutations.py $(WORDS)

##@ Change the template

lint: .venv/installed ## Check style, imports and types
	.venv/bin/python -m ruff check
	.venv/bin/python -m ruff format --check
	.venv/bin/python -m mypy

wheel: .venv/installed ## Build the wheels of the library and the emulator, and try the emulator's
	rm -rf .venv/wheel && mkdir .venv/wheel
	for folder in plugins emulator; do \
		.venv/bin/uv build --quiet --wheel --out-dir .venv/wheel $$folder || exit; \
	done
	.venv/bin/uv venv --quiet --python .venv/bin/python .venv/wheel/venv
	.venv/bin/uv pip install --quiet --python .venv/wheel/venv .venv/wheel/polars_cloud_emulator-*.whl pytest
	env --unset PYTHONPATH .venv/wheel/venv/bin/polars-cloud-emulator serve --help >/dev/null
	cp emulator/examples/test_queries.py .venv/wheel
	cd .venv/wheel && env --unset PYTHONPATH venv/bin/python -m pytest -q -c /dev/null --rootdir . \
		--confcutdir . -W error test_queries.py

# Keeps versions that still fit. Delete the lock files to get the newest version of everything.
lock: LOCK = .venv/bin/uv pip compile --quiet --no-build --universal --generate-hashes \
	--custom-compile-command 'make lock' --python-version $(lastword $(PYTHON_VERSIONS))
lock: .venv/bin/uv ## Update the lock files after a change of versions
	$(LOCK) --output-file requirements-dev.lock requirements.txt --group dev
	# The packages that the image adds to Airflow's own.
	sed -n '/^polars-cloud/p' requirements.txt | $(LOCK) --no-emit-package \
		typing-extensions --constraint requirements-dev.lock --output-file requirements.lock -
	# FastAPI of Airflow 3.1 needs an older Starlette than the emulator.
	for version in $(OLDER_AIRFLOWS); do \
		if [ $$version = 3-1 ]; then echo 'starlette<0.49'; fi | $(LOCK) --overrides /dev/stdin \
			--output-file .ci/airflow-$$version.lock requirements.txt \
			--group airflow-$$version --group emulator --group tests || exit; \
	done

outdated: .venv/installed ## List newer versions of pinned packages, and their changes in the lock
	.venv/bin/python scripts/outdated.py

##@ Measure

bench bench-calls bench-comparison bench-load bench-waiting: PYTHONPATH := $(PYTHONPATH):$(CURDIR)/scripts
bench: .venv/installed ## Measure the emulator's footprint and the cost of each pattern
	.venv/bin/python benchmarks/emulator_footprint.py
	.venv/bin/python benchmarks/cluster_cost.py

bench-calls: .venv/installed ## Count a task's API calls and measure its overhead; 3 minutes
	.venv/bin/python benchmarks/task_calls.py

bench-load: .venv/installed ## Load the emulator with large data and thousands of queries; 4 minutes
	.venv/bin/python benchmarks/emulator_load.py

bench-waiting: .venv/installed ## Measure the cost of waiting in the worker and in the triggerer; 1 hour
	.venv/bin/python benchmarks/waiting.py

bench-comparison: .venv/installed ## Compare costs and failures with the published example's wiring
	.venv/bin/python benchmarks/billed_beyond_queries.py
	.venv/bin/python benchmarks/published_failures.py

##@ Clean up

clean: ## Delete everything that these commands created
	rm -rf .venv .airflow .emulator .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -r {} +

# The constraint makes the installation fail if the lock is older than requirements.txt.
.venv/installed: requirements.txt requirements-dev.lock | .venv/bin/uv
	@echo 'Installing and compiling packages in .venv, once: about half a minute'
	@.venv/bin/uv pip sync --quiet --python .venv --no-build --constraint requirements.txt \
		requirements-dev.lock
	@touch $@

.venv/airflow-%/installed: .ci/airflow-%.lock | .venv/bin/uv
	.venv/bin/uv venv --quiet --clear --python .venv/bin/python .venv/airflow-$*
	.venv/bin/uv pip sync --quiet --python .venv/airflow-$* --no-build $<
	@touch $@

.venv/bin/uv:
	@version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	case ' $(PYTHON_VERSIONS) ' in *" $${version:-missing} "*) ;; *) \
		echo "Python $(lastword $(PYTHON_VERSIONS)) to $(firstword $(PYTHON_VERSIONS)) is needed," \
			"$(PYTHON) is $${version:-missing}: install one, or name it as in" \
			"'make PYTHON=/path/to/python3'." >&2; exit 1;; \
	esac
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: on Debian and Ubuntu," \
			"install the package python3-venv." >&2; exit 1; }
	@echo 'Making .venv with $(PYTHON)'
	@$(PYTHON) -m venv --clear .venv
	@sed -n '/^uv==/,/# via/p' requirements-dev.lock >.venv/uv.txt
	@.venv/bin/python -m pip install --quiet --no-cache-dir --disable-pip-version-check \
		--requirement .venv/uv.txt
