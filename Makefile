# One line each, for people, in an active virtual environment.
CSRC = $(shell find csrc tests -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: build test lint format bench sanitize models kernels random faults hostile interrupts gpu

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

faults:  ## 330 seeded faults over every layer, on one host and on several: a quarter of an hour
	PYCOMM_TEST_FAULTS=330 python -m pytest tests/faults --log-cli-level=INFO

interrupts:  ## Ctrl-C at 100 seeded moments of the first seconds of pycomm pretrain: a quarter of an hour
	python -m tests.pretrain.interrupts --rounds 100

hostile:  ## 10,000 mutated messages of meetings and stores, and connections of another user (as root): a minute
	PYCOMM_TEST_MESSAGES=10000 python -m pytest tests/host/test_hostile.py --log-cli-level=INFO

sanitize:  ## the host transport and the CUDA kernels under ThreadSanitizer and AddressSanitizer, many more rounds
	PYCOMM_TEST_CALLS=2000 PYCOMM_TEST_ROUNDS=40 PYCOMM_TEST_SEEDS=50 python -m pytest tests/sanitize tests/cuda_on_cpu

models:  ## the signal protocol of the CUDA kernels, larger models than in the tests; needs spin (a Debian package)
	PYCOMM_TEST_MODELS=large python -m pytest tests/protocol

kernels:  ## the CUDA kernels for every architecture; needs nvcc, no GPU; a register spill is an error
	cmake -S . -B build/kernels -G Ninja -DPYCOMM_CUDA=ON -DCMAKE_CUDA_FLAGS="-Xptxas -v" -DSKBUILD_PROJECT_VERSION=0 -Dpybind11_DIR=$$(python -m pybind11 --cmakedir)
	ninja -C build/kernels pycomm_kernels | tee build/kernels/log
	! grep -E "[1-9][0-9]* bytes spill" build/kernels/log

bench:  ## every operation beside its competitors
	python benchmarks/allreduce.py --ranks 2 --sizes 1K:256M
	python benchmarks/collectives.py --ranks 2 --sizes 1K:64M
	python benchmarks/p2p.py --sizes 8,1K:64M
	python benchmarks/pipeline.py

gpu:  ## on a machine with a GPU, no network: builds, tests, sanitizers and measurements in 9 minutes
	python3 benchmarks/gpu.py
