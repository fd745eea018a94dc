# An image with megatron-stable, and NVIDIA's apex built from source; docs/container.md says how to run it on many nodes.
#
#   docker build -t megatron-stable .
#   docker build -t megatron-stable:cpu --build-arg BASE=python:3.11-slim .     # without CUDA, and without apex
#
# BASE needs Debian's or Ubuntu's apt and a Python with venv. If it has torch at the version of constraints.txt, that is
# taken; apex needs its nvcc (a "devel" image), of the CUDA that torch was built for.

ARG BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-devel

# ---- what both stages stand on: the tools to build with, and an environment with torch, on top of what BASE has
# hadolint ignore=DL3006
FROM ${BASE} AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV DS_BUILD_OPS=0 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/venv/bin:$PATH

# g++: torch.compile and DeepSpeed's just-in-time operators; versions are those of the base image's distribution
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends g++ git make \
    && (python3 -c 'import ensurepip, venv' \
        || DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3-venv) \
    && rm -rf /var/lib/apt/lists/*

COPY constraints.txt /opt/megatron-stable/
RUN python3 -m venv --system-site-packages /opt/venv \
    && pip install -c /opt/megatron-stable/constraints.txt setuptools wheel packaging ninja torch numpy

# ---- apex: a wheel in /wheels, or nothing where there is no nvcc
FROM base AS apex
ARG APEX_REF=26.09
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0"
ARG MAX_JOBS=8
ENV APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD=4 NVCC_APPEND_FLAGS="--threads 2"
WORKDIR /src
RUN mkdir /wheels \
    && if command -v nvcc; then \
        git clone --depth 1 --branch "${APEX_REF}" https://github.com/NVIDIA/apex . \
        && pip wheel --no-build-isolation --no-deps --wheel-dir /wheels . ; \
    fi

# ---- the image
FROM base AS image
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# ssh and pdsh: DeepSpeed's launcher reaches the other nodes by them, and sshd lets it in
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        iproute2 openssh-client openssh-server pdsh tini \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*

RUN --mount=type=bind,from=apex,source=/wheels,target=/wheels \
    find /wheels -name '*.whl' -exec pip install --no-deps {} + \
    && pip install -c /opt/megatron-stable/constraints.txt deepspeed

WORKDIR /opt/megatron-stable
COPY setup.py README.md LICENSE ./
COPY megatron_stable megatron_stable
RUN pip install -c constraints.txt .
COPY examples examples
COPY tools tools

# the user of the shared file system (not named UID, which is a variable of bash's own)
ARG USER_ID=1000
ARG GROUP_ID=1000
RUN [ "${USER_ID}" != 0 ] \
    && (getent group "${GROUP_ID}" || groupadd --gid "${GROUP_ID}" trainer) \
    && if name=$(getent passwd "${USER_ID}" | cut -d: -f1) && [ -n "${name}" ]; then \
        usermod --login trainer --gid "${GROUP_ID}" --shell /bin/bash --home /home/trainer --move-home "${name}" ; \
    else \
        useradd --uid "${USER_ID}" --gid "${GROUP_ID}" --create-home --shell /bin/bash trainer ; \
    fi \
    && install -d -o "${USER_ID}" -g "${GROUP_ID}" /work
USER ${USER_ID}:${GROUP_ID}
ENV BIN=/opt/venv/bin
WORKDIR /work
ENTRYPOINT ["tini", "--", "megatron-stable"]
CMD ["--help"]
