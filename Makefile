# One line each, for people, in an active virtual environment.
CSRC = $(shell find csrc tests -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: build test lint format bench sanitize random

build:  ## editable install; once more after a change in csrc/
	python -m pip install -c constraints.txt -e '.[test]'

test:  ## every test
	python -m pytest

lint:  ## what CI refuses: rules, formatting, types
	ruff check . && ruff format --check . && mypy && clang-format --dry-run -Werror $(CSRC)

format:  ## put Python and C++ into the enforced format
	ruff check --fix . && ruff format . && clang-format -i $(CSRC)

random:  ## 100,000 random collectives and messages on 1 to 4 ranks, each compared with NumPy: a quarter of an hour
	PYCOMM_TEST_CALLS=25000 python -m pytest tests/host/test_random_calls.py -k test_random_programs --log-cli-level=INFO

sanitize:  ## the host transport under ThreadSanitizer and AddressSanitizer
	python -m pytest tests/sanitize

bench:  ## every operation beside its competitors
	python benchmarks/allreduce.py --ranks 2 --sizes 1K:256M
	python benchmarks/collectives.py --ranks 2 --sizes 1K:64M
	python benchmarks/p2p.py --sizes 8,1K:64M
