# occfeat with everything, for a CPU or with a build argument for NVIDIA GPUs:
#
#   docker build --tag occfeat .
#   docker build --tag occfeat --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 .
#   docker run --rm --volume "$PWD:/data" occfeat occfeat-targets demo-data demo-world
#
# GPUs take --gpus all, and reading processes --shm-size 8g. Files are written as root, or with
# --user "$(id -u):$(id -g)" as yours.
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /occfeat

# Versions first: a change of the code alone does not install everything again.
COPY constraints.txt ./
RUN pip install --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY occfeat_targets occfeat_targets
COPY occfeat_train occfeat_train
COPY pipelines pipelines
RUN pip install --constraint constraints.txt '.[targets]' \
    && occfeat-targets --version && occfeat-train --version && occfeat-reproduce --help

WORKDIR /data
CMD ["occfeat-targets", "--help"]
