# Everything runs in .venv, made on first use. Only Python 3.11, make and the package index are needed.
# On a machine without a GPU, PIP_EXTRA_INDEX_URL may name PyTorch's CPU wheel channel (README.md).

PYTHON ?= python3.11
BIN := .venv/bin
TRITON := triton==3.6.0
# of the package that the demo builds; without a GPU any is run by references
ARCH ?= sm89
NANO := engine/demo/nano
NANO2 := engine/demo/nano_scail2
SCENE := --image $(NANO2)/dancer.png --reference-mask $(NANO2)/dancer_mask.png \
  --video $(NANO2)/driving.mp4 --mask $(NANO2)/driving_mask.npz

.PHONY: setup demo playground test test-slow lint bench proof clean

setup: .venv/ready

# torch first, so that nothing else chooses its build, and the build that the driver here can run;
# triton alone, as only its compiler is used; then a cuDNN that the build of an older driver needs;
# ptxas last, so that tests compile kernels without a network
.venv/ready: pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip==26.3
	$(BIN)/python -m engine.machine.torch_build torch > .venv/torch.txt
	$(BIN)/python -m pip install --quiet --requirement .venv/torch.txt
	$(BIN)/python -m pip install --quiet --no-deps $(TRITON)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m engine.machine.torch_build last > .venv/last.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement .venv/last.txt
	$(BIN)/python -m kernels.aot.toolkit .venv/scail-build
	touch $@

demo: setup
	mkdir -p out/stages
	$(BIN)/python build_engine.py --arch $(ARCH) --preset nano --out out/packages
	$(BIN)/python -m engine generate --package out/packages/preview/$(ARCH) --image $(NANO)/dancer.png --joints $(NANO)/dance.npz \
	  --stages out/stages --out out/stages/clip.mp4
	$(BIN)/python -m engine.demo.show --image $(NANO)/dancer.png --stages out/stages --clip out/stages/clip.mp4 \
	  --out out/demo.mp4 --beside out/demo-side-by-side.mp4
	$(BIN)/python build_engine.py --arch $(ARCH) --preset nano-scail2 --out out/packages
	for mode in animation replacement; do \
	  $(BIN)/python -m engine generate --package out/packages/scail2/$(ARCH) --mode $$mode $(SCENE) --out out/stages/$$mode.mp4 && \
	  $(BIN)/python -m engine.demo.show --image $(NANO2)/dancer.png --driving $(NANO2)/driving.mp4 \
	    --clip out/stages/$$mode.mp4 --beside out/demo-$$mode.mp4 || exit 1; \
	done

# the shipped models, on any machine; docs/serve.md
playground: setup
	$(BIN)/python -m engine playground

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# a process a core, each with one thread: two threads of one test would only wait for each other
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n auto --maxprocesses 4 --dist loadfile --durations 20

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not gpu"

# one thread, so that the times of two machines can be compared
bench: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run.py media kernels denoiser clip quality cold-start --runs 2 --sizes 96x64

# all that can be shown of the compiled kernels without a GPU (virtual_gpu/README.md)
proof: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m virtual_gpu --out docs/proof.md

clean:
	rm -rf out .venv
