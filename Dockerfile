# An image with megatron-stable for NVIDIA GPUs. It has not been built in CI: take it as a starting point.
#
#   docker build -t megatron-stable .
#   docker run --gpus all --ipc=host -v "$PWD:/work" megatron-stable pretrain --config config.yaml --ranks 8
#
# --ipc=host gives NCCL and the data loader the shared memory that Docker's 64 MB default does not.

FROM python:3.12-slim

# g++: torch.compile and DeepSpeed's just-in-time operators; the ssh client: DeepSpeed's launcher, for more than one node
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/megatron-stable
ENV DS_BUILD_OPS=0 PIP_NO_CACHE_DIR=1

# the dependencies have a layer of their own, which a change of the source does not rebuild; torch brings CUDA along
COPY constraints.txt ./
RUN pip install setuptools wheel && pip install -c constraints.txt torch numpy && pip install -c constraints.txt deepspeed

COPY setup.py README.md LICENSE ./
COPY megatron_stable megatron_stable
RUN pip install -c constraints.txt .

WORKDIR /work
ENTRYPOINT ["megatron-stable"]
CMD ["--help"]
