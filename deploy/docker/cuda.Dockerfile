# syntax=docker/dockerfile:1
# Tandem with the CUDA builds of PyTorch and vLLM, for the learner and for actors.
#
#   docker build -f deploy/docker/cuda.Dockerfile -t tandem:0.1.0-cuda .        from the repository's root
#   docker run --rm -it --gpus all --shm-size=16g -v "$PWD/runs:/home/tandem/runs" tandem:0.1.0-cuda demo
#
# PyTorch brings its CUDA libraries; the base is there for nvcc, with which vLLM's kernels are compiled on first use.
# The host's driver must be new enough for CUDA 13. An index of your own: --secret, as in cpu.Dockerfile.
# docs/operations.md says what of this has been run. EXPOSE: deploy/ports.py; a test compares them.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make wget python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/tandem
COPY pyproject.toml README.md LICENSE ./
COPY protocol protocol
COPY actor actor
COPY learner learner
COPY deploy deploy
COPY recipes recipes
# The same set-up as `TANDEM_EXTRA=gpu make setup`.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    PIP_NO_CACHE_DIR=1 python3 deploy/install.py --variant gpu

# Ubuntu's image has a user 1000 already.
RUN userdel --remove ubuntu && useradd --create-home --uid 1000 tandem \
    && mkdir /home/tandem/runs && chown tandem:tandem /home/tandem/runs
USER 1000:1000
WORKDIR /home/tandem
ENV PATH=/opt/tandem/.venv/bin:$PATH \
    HOME=/home/tandem \
    RAY_USAGE_STATS_ENABLED=0
EXPOSE 7700 7701 7702 7703 6379 8076 8077 8078 8079 8080 52365 10002-10999 8265
ENTRYPOINT ["tandem"]
CMD ["--help"]
