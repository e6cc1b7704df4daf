# The runs behind the tables of README.md and docs/, on a machine with a CUDA GPU, from the root of the repository:
#
#   make -f benchmarks/tables.mk -k -j8 accuracy MODELS='out/first out/second' TEXTS='docs.txt code.txt'
#   make -f benchmarks/tables.mk -k speed MODELS=out/first TEXTS='docs.txt code.txt'
#
# The first runs beside each other, since they count nats; the second one after another, on a quiet machine, since they
# count microseconds. A run keeps its folder with what it wrote and its log, and is not repeated where it ended well.

PYTHON ?= .venv/bin/python
OUT ?= out/tables
MODELS ?=
TEXTS ?=
ROLES ?= q k v o routed-gate routed-up routed-down
WINDOWS ?= 24
# in memory, so that no disk counts: checkpoints of random codes, 21 and 13 GB
MEMORY ?= /dev/shm
# what vLLM's CPU build cannot run, and what it runs by another class than GPUs of NVIDIA
FAMILIES ?= kimi_linear deepseek_v32 glm_moe_dsa deepseek_v4 hy_v4 laguna
# of one run; what is cut off keeps its log
SECONDS_A_RUN ?= 3600
CONTENDERS ?= milo int4-g128 marlin-int4-g128 humming-uint3-g64

NAMES := $(notdir $(MODELS))
model = $(firstword $(filter %/$1 $1,$(MODELS)))
# $1: a module and its options, which may name $(@D), the folder of the run
run = @mkdir -p $(@D); echo "$(@D): $1" >&2; \
	timeout $(SECONDS_A_RUN) $(PYTHON) $1 > $(@D)/log 2>&1 || { tail -n 3 $(@D)/log >&2; exit 1; }; touch $@

ROLE_RUNS := $(foreach name,$(NAMES),$(ROLES:%=$(OUT)/roles/$(name)/%/ended))
DIVERGENCE_RUNS := $(NAMES:%=$(OUT)/divergence/%/ended)
AT_LOAD_RUNS := $(NAMES:%=$(OUT)/at-load/%/ended)
WIDE_RUNS := $(OUT)/wide/deepseek/ended $(OUT)/wide/qwen3_5_moe_text/ended
FAMILY_RUNS := $(FAMILIES:%=$(OUT)/families/%/ended)
TRAFFIC_RUNS := $(OUT)/traffic/mixtral/ended $(OUT)/traffic/qwen3/ended
DECODE_RUNS := $(OUT)/decode/mixtral/ended $(OUT)/decode/qwen3/ended
KERNEL_RUNS := $(OUT)/moe_layer/ended $(OUT)/linear/ended $(OUT)/wide/ended
LOAD_RUNS := $(OUT)/load/mixtral/ended $(OUT)/load/qwen3/ended
SOAK_RUNS := $(NAMES:%=$(OUT)/soak/%/ended)
SOAK_RUNS_IN_16_BITS := $(NAMES:%=$(OUT)/soak-16-bits/%/ended)

.PHONY: accuracy speed
ifneq ($(filter speed,$(MAKECMDGOALS)),)
.NOTPARALLEL:  # whatever -j says
endif
accuracy: $(WIDE_RUNS) $(FAMILY_RUNS) $(DIVERGENCE_RUNS) $(ROLE_RUNS)
speed: $(KERNEL_RUNS) $(DECODE_RUNS) $(TRAFFIC_RUNS) $(AT_LOAD_RUNS) $(LOAD_RUNS) $(SOAK_RUNS)

layers_of_mixtral = 32
layers_of_qwen3 = 48
parts = $(subst /, ,$(@D:$(OUT)/%=%))

$(ROLE_RUNS):
	$(call run,-m benchmarks.roles_alone $(call model,$(word 2,$(parts))) --text $(TEXTS) -o $(@D) \
		--max-windows $(WINDOWS) --roles $(word 3,$(parts)))

$(DIVERGENCE_RUNS):
	$(call run,-m benchmarks.divergence $(call model,$(word 2,$(parts))) --text $(TEXTS) -o $(@D))

$(AT_LOAD_RUNS):
	$(call run,-m benchmarks.accuracy.at_load.run $(call model,$(word 2,$(parts))) --text $(TEXTS) -o $(@D)/at-load.json)

$(WIDE_RUNS):
	$(call run,tests/wide_families.py $(word 2,$(parts)))

$(FAMILY_RUNS):
	$(call run,tests/served_families.py $(word 2,$(parts)))

$(KERNEL_RUNS):
	$(call run,-m benchmarks.kernels.$(word 1,$(parts)) -o $(@D)/record.json)

$(LOAD_RUNS):
	$(call run,-m benchmarks.serving.load -o $(@D)/load.json --model $(word 2,$(parts)) \
		--folder $(MEMORY)/milo-$(word 2,$(parts)))

$(SOAK_RUNS_IN_16_BITS):
	$(call run,-m benchmarks.serving.soak $(call model,$(word 2,$(parts))) --minutes 3 -o $(@D)/soak.json)

$(SOAK_RUNS): $(OUT)/soak/%/ended: $(OUT)/soak-16-bits/%/ended
	$(call run,-m benchmarks.serving.soak $(call model,$(word 2,$(parts))) --beside $(<D)/soak.json -o $(@D)/soak.json \
		-- --quantization milo)

$(DECODE_RUNS):
	$(call run,-m benchmarks.serving.decode -o $(@D)/decode.json --model $(word 2,$(parts)))

$(TRAFFIC_RUNS):
	$(call run,-m benchmarks.serving.traffic -o $(@D)/traffic.json --model $(word 2,$(parts)) \
		--layers $(layers_of_$(word 2,$(parts))) --contenders $(CONTENDERS))
