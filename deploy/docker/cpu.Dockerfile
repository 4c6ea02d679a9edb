# syntax=docker/dockerfile:1
# Tandem with the CPU builds of PyTorch and vLLM: the learner or an actor without GPU, tests, a first look.
#
#   docker build -f deploy/docker/cpu.Dockerfile -t tandem:0.1.0-cpu .          from the repository's root
#   docker run --rm -it --shm-size=2g -v "$PWD/runs:/home/tandem/runs" tandem:0.1.0-cpu demo
#
# An index of your own: docker build --secret id=pip,src=$HOME/.config/pip/pip.conf … (it stays out of the image).
# docs/operations.md says what of this has been run. EXPOSE: deploy/ports.py; a test compares them.
FROM python:3.11.13-slim-bookworm

# g++: vLLM and torch compile kernels as they run. wget: KubeRay's health checks.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make wget \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/tandem
COPY pyproject.toml README.md LICENSE ./
COPY protocol protocol
COPY actor actor
COPY learner learner
COPY deploy deploy
COPY recipes recipes
# The same set-up as `make setup`: pinned lists, without dependencies, then a check that it imports.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    PIP_NO_CACHE_DIR=1 python3 deploy/install.py --variant cpu

RUN useradd --create-home --uid 1000 tandem \
    && mkdir /home/tandem/runs && chown tandem:tandem /home/tandem/runs
USER 1000:1000
WORKDIR /home/tandem
ENV PATH=/opt/tandem/.venv/bin:$PATH \
    HOME=/home/tandem \
    RAY_USAGE_STATS_ENABLED=0
EXPOSE 7700 7701 7702 7703 6379 8076 8077 8078 8079 8080 52365 10002-10999 8265
ENTRYPOINT ["tandem"]
CMD ["--help"]
