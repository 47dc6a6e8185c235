# make             the program: GPU and CPU in one binary where nvcc is found, else CPU only
# make cpu         CPU only, whatever is installed
# make quickstart  set up, build, train the tiny preset on real text, show a sample
# make test        build and run every test this machine can run
# make bench       time the training step beside PyTorch's (bench/README.md); BENCH="--presets 60m" passes options
# make help        this text
#
# Settings: GPU_ARCHS="86 89" (default: this machine's GPU, else 80 86 89 90), CXX, NVCC, MARCH=native, OPENBLAS_DIR=/opt/openblas,
# CUDA=0 (as make cpu), V=1 (show the commands). Several GPUs in one run need NCCL, several CPU processes Gloo: each is used where it is found.
# NCCL_DIR=/opt/nccl (the folder with include/nccl.h; default: the CUDA Toolkit, /usr, /usr/local), NCCL=0 and GLOO=0 do without.

Q        := $(if $(V),,@)
CXX      ?= g++
NVCC     ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
MARCH    ?= native
CUDA     ?= $(if $(NVCC),1,0)
ifneq ($(CUDA),1)
NVCC :=
endif
BUILD    := $(if $(NVCC),build,build-cpu)

# Compute capabilities: of the GPUs in this machine, else every generation we support, with PTX for newer ones.
DETECTED := $(if $(NVCC),$(sort $(subst .,,$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -E '^[0-9]+\.[0-9]+$$'))))
GPU_ARCHS ?= $(if $(DETECTED),$(DETECTED),80 86 89 90)
NEWEST   := $(lastword $(GPU_ARCHS))
GENCODE  := $(foreach a,$(GPU_ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) -gencode arch=compute_$(NEWEST),code=compute_$(NEWEST)

comma := ,
OPENBLAS_CFLAGS := $(if $(OPENBLAS_DIR),-I$(OPENBLAS_DIR)/include,$(shell pkg-config --cflags openblas 2>/dev/null))
OPENBLAS_LIBS   := $(if $(OPENBLAS_DIR),-L$(OPENBLAS_DIR)/lib -Wl$(comma)-rpath$(comma)$(OPENBLAS_DIR)/lib) -lopenblas

COMMON   := -std=c++17 -O3 -I. $(OPENBLAS_CFLAGS) -MMD -MP
CXXFLAGS ?=
WARN     := -Wall -Wextra
HOST     := -march=$(MARCH) -fopenmp -ffp-contract=off
# Catch2 v3 is a library, v2 headers only.
CATCH_LIBS := $(if $(wildcard /usr/include/catch2/catch_all.hpp /usr/local/include/catch2/catch_all.hpp)$(shell pkg-config --atleast-version=3 catch2 2>/dev/null && echo 3),-lCatch2)
LIBS     := $(OPENBLAS_LIBS) -lpthread -lstdc++fs
ifneq ($(NVCC),)
CUDA_HOME := $(patsubst %/bin/nvcc,%,$(realpath $(NVCC)))
CUDA_LIBS := -L$(CUDA_HOME)/lib64 -L$(CUDA_HOME)/targets/x86_64-linux/lib -Wl,-rpath,$(CUDA_HOME)/lib64 -lcublasLt -lcublas -lcusolver -lcudart
DEFINES  := -DWITH_CUDA
# NCCL: its header, and its library under the name that it has everywhere, also in the Python package nvidia-nccl.
ifneq ($(NCCL),0)
NCCL_HEADER := $(firstword $(wildcard $(patsubst %,%/include/nccl.h,$(or $(NCCL_DIR),$(CUDA_HOME) /usr /usr/local))))
NCCL_HOME   := $(NCCL_HEADER:%/include/nccl.h=%)
NCCL_LIBRARY := $(if $(NCCL_HOME),$(firstword $(wildcard $(patsubst %,$(NCCL_HOME)/%/libnccl.so.2,lib lib64 targets/x86_64-linux/lib lib/x86_64-linux-gnu))))
endif
endif
ifneq ($(GLOO),0)
HAVE_GLOO := $(shell $(CXX) -std=c++17 -fsyntax-only -x c++ -include gloo/allreduce.h /dev/null 2>/dev/null && echo 1)
endif

# What connects the ranks of a run (comm/). The files that depend on the choice are compiled again when it changes.
COMM_SETTING := $(if $(NCCL_LIBRARY),-DWITH_NCCL -I$(NCCL_HOME)/include) $(if $(HAVE_GLOO),-DWITH_GLOO)
CUDA_LIBS    := $(if $(NCCL_LIBRARY),$(NCCL_LIBRARY) $(patsubst %,-Wl$(comma)-rpath$(comma)%,$(filter-out /usr/lib /usr/lib/% /usr/lib64,$(patsubst %/,%,$(dir $(NCCL_LIBRARY)))))) $(CUDA_LIBS)
LIBS         += $(if $(HAVE_GLOO),-lgloo)
COMM_OBJ     := $(BUILD)/comm/communicator.o $(BUILD)/comm/gloo.o $(BUILD)/comm/nccl.cu.o

CORE_CPP := $(filter-out train_loqt.cpp,$(wildcard *.cpp)) $(wildcard comm/*.cpp runtime/*.cpp)
CORE_CU  := $(wildcard *.cu comm/*.cu ops/*.cu runtime/*.cu)
TEST_CPP := $(wildcard test/*.cpp)
CORE_OBJ := $(CORE_CPP:%.cpp=$(BUILD)/%.o) $(CORE_CU:%.cu=$(BUILD)/%.cu.o)
TEST_OBJ := $(TEST_CPP:%.cpp=$(BUILD)/%.o)

.PHONY: all cpu test bench print-bench quickstart help clean check-libraries
.DEFAULT_GOAL := all

all: train_loqt

# The binary in the repository root is the one built last; objects of both kinds live side by side.
train_loqt: $(BUILD)/train_loqt FORCE
	@cmp -s $< $@ || cp -f $< $@
FORCE:

cpu:
	@$(MAKE) --no-print-directory CUDA=0 all

$(BUILD)/train_loqt: $(BUILD)/train_loqt.o $(CORE_OBJ)
	@echo "link $@, $(if $(NVCC),for GPUs$(if $(NCCL_LIBRARY), (several: with NCCL), (one: no NCCL found)),for CPUs)$(if $(HAVE_GLOO),$(comma) several CPU processes with Gloo)"
	$(Q)$(CXX) $(HOST) -o $@ $^ $(CUDA_LIBS) $(LIBS)

$(BUILD)/bench_step: $(BUILD)/bench/bench_step.o $(CORE_OBJ)
	@echo "link $@"
	$(Q)$(CXX) $(HOST) -o $@ $^ $(CUDA_LIBS) $(LIBS)

# Programs that time one kind of kernel: make build/bench_attention.
$(BUILD)/bench_%: $(BUILD)/bench/kernels/bench_%.cu.o $(CORE_OBJ)
	@echo "link $@"
	$(Q)$(CXX) $(HOST) -o $@ $^ $(CUDA_LIBS) $(LIBS)

$(BUILD)/tests: $(TEST_OBJ) $(CORE_OBJ)
	@echo "link $@"
	$(Q)$(CXX) $(HOST) -o $@ $^ $(CATCH_LIBS) $(CUDA_LIBS) $(LIBS)

$(BUILD)/test/%.o: test/%.cpp | check-libraries
	@mkdir -p $(@D); echo "compile $<"
	$(Q)$(CXX) $(COMMON) $(WARN) -O1 $(HOST) $(DEFINES) $(CXXFLAGS) -c $< -o $@

$(BUILD)/%.o: %.cpp | check-libraries
	@mkdir -p $(@D); echo "compile $<"
	$(Q)$(CXX) $(COMMON) $(WARN) $(HOST) $(DEFINES) $(CXXFLAGS) -c $< -o $@

ifneq ($(NVCC),)
$(BUILD)/%.cu.o: %.cu | check-libraries
	@mkdir -p $(@D); echo "compile $<"
	$(Q)$(NVCC) $(COMMON) $(GENCODE) $(DEFINES) -ccbin $(CXX) $(foreach f,$(WARN) $(HOST),-Xcompiler $(f)) -c $< -o $@
else
$(BUILD)/%.cu.o: %.cu | check-libraries
	@mkdir -p $(@D); echo "compile $<"
	$(Q)$(CXX) $(COMMON) $(WARN) $(HOST) $(CXXFLAGS) -x c++ -c $< -o $@
endif

$(COMM_OBJ): COMMON += $(COMM_SETTING)
$(COMM_OBJ): $(BUILD)/comm/setting
$(BUILD)/comm/setting: FORCE
	@mkdir -p $(@D); echo "$(COMM_SETTING)" | cmp -s - $@ || echo "$(COMM_SETTING)" > $@

check-libraries:
	@sh scripts/check_libraries.sh "$(CXX)" "$(OPENBLAS_CFLAGS)"

test:
	@sh scripts/setup.sh test
	@$(MAKE) --no-print-directory $(if $(findstring -j,$(MAKEFLAGS)),,-j$(shell nproc)) $(if $(NVCC),,CUDA=0) all $(BUILD)/tests $(BUILD)/bench_step
	@python3 test/run.py $(BUILD)/tests

bench:
	@python3 bench/run.py $(BENCH)
# For bench/run.py: builds the program and says where it is.
print-bench: $(BUILD)/bench_step
	@echo $<

quickstart:
	@bash scripts/quickstart.sh

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -10

clean:
	rm -rf build build-cpu train_loqt

-include $(CORE_OBJ:.o=.d) $(TEST_OBJ:.o=.d) $(BUILD)/train_loqt.d $(wildcard $(BUILD)/bench/*.d $(BUILD)/bench/kernels/*.d)
