# make help lists what there is. Each installs into .venv first if need be; PYTHON=python3.11 chooses
# the interpreter.

PYTHON ?= python3
VENV ?= .venv
STORE ?= targets.zarr
DEMO ?= demo-world

bin := $(VENV)/bin
installed := $(VENV)/.installed
options := $(if $(VERSION),--version $(VERSION)) $(if $(TEACHER),--teacher $(TEACHER)) \
	$(if $(WORKERS),--workers $(WORKERS)) $(if $(SCHEDULER),--scheduler $(SCHEDULER))

.PHONY: help install targets miniature lidar pop3d test long quick fuzz torture lint format
.DEFAULT_GOAL := targets

# One line each, here and nowhere else.
define help
make targets     a demo world and its targets, targets.zarr (a small teacher, no download)
make targets NUSCENES=/data/sets/nuscenes [VERSION=v1.0-trainval] [STORE=/fast/targets.zarr]
                 [TEACHER=DIR or hub id] [WORKERS=8] [SCHEDULER=tcp://host:8786]
make miniature   the paper's Table 3 on a demo world, with five seeds: an hour or more
make lidar       ScaLR, SLidR and ALSO on a demo world, with three seeds
make pop3d       POP-3D on a demo world, with three seeds
make install     into .venv alone
make test        all tests but those of make long
make long        all tests, the long ones too
make quick       the pure parts, a minute
make fuzz        all that is parsed, 10,000 damaged cases each: hours
make torture     builds and trainings killed, starved and damaged, 100 rounds each: hours
make lint        ruff, and types
make format      ruff mends what it can
endef

help:
	$(info $(help))
	@:

install: $(installed)

$(installed): setup.cfg pyproject.toml constraints.txt
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet --constraint constraints.txt \
		--editable '.[targets,lite0,dev]'
	touch $@

ifdef NUSCENES
targets: $(installed)
	$(bin)/occfeat-targets build '$(NUSCENES)' '$(STORE)' $(options)
else
targets: $(installed)
	$(bin)/occfeat-targets demo-data '$(DEMO)'
	$(bin)/occfeat-targets build '$(DEMO)' '$(STORE)' --config demo $(options)
	$(bin)/occfeat-targets verify '$(STORE)'
endif
	$(bin)/occfeat-targets info '$(STORE)'
	@echo "Next: source $(bin)/activate, then occfeat-train pretrain --store '$(STORE)'"

world := demo-data miniature-world --version v1.0-trainval --scenes 48 --samples 3

miniature: $(installed)
	$(bin)/occfeat-targets $(world)
	$(bin)/occfeat-targets build miniature-world miniature.zarr --config miniature
	$(bin)/python pipelines/reproduce.py --table 3 --preset miniature

lidar: $(installed)
	$(bin)/occfeat-targets $(world)
	$(bin)/occfeat-targets build miniature-world lidar-miniature.zarr --config lidar-miniature
	$(bin)/python pipelines/reproduce.py --table lidar-miniature --preset lidar-miniature

pop3d: $(installed)
	$(bin)/occfeat-targets $(world)
	$(bin)/occfeat-targets build miniature-world pop3d-miniature.zarr --config pop3d-miniature
	$(bin)/occfeat-targets text stand-ins.safetensors --stand-in pop3d-miniature.zarr
	$(bin)/python pipelines/reproduce.py --table pop3d-miniature --preset pop3d-miniature

# One thread each: threads of one test would only get in the way of another's. Many tests wait, so
# that three fill two cores; and many start processes, which shall not compile each for itself.
pytest := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= \
	$(bin)/python -m pytest --numprocesses 3 --dist worksteal

test: $(installed)
	$(pytest)

long: $(installed)
	OCCFEAT_LONG=1 $(pytest)

quick: $(installed)
	$(pytest) -m 'not slow'

# Everything that is parsed, 10,000 damaged cases each: an hour and a half on two cores.
fuzz: $(installed)
	OCCFEAT_FUZZ=10000 $(pytest) --verbose --timeout 7200 tests/test_fuzz.py

# Builds, then trainings, that are killed, stopped, starved and doubled.
torture: $(installed)
	$(bin)/python tests/torture_store.py --rounds 100 --seed 1
	$(bin)/python tests/torture_pairs.py --damages 2000 --pairs 50
	OMP_NUM_THREADS=1 $(bin)/python tests/torture_train.py --rounds 100 --seed 1

lint: $(installed)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/basedpyright --level error

format: $(installed)
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
