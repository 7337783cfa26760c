# The commands with their CUDA libraries, for a host with an NVIDIA driver and its container toolkit.
# docs/howto.md has the commands that build and run it.

FROM python:3.13-slim AS build
WORKDIR /source
COPY . .
RUN python -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir ".[tracking]"

FROM python:3.13-slim
# torch compiles kernels with it; Debian keeps one version for each release
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/venv /opt/venv
# caches go where any user of `docker run --user` may write
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    nnUNet_raw=/data/raw \
    nnUNet_preprocessed=/data/preprocessed \
    nnUNet_results=/data/results \
    nnUNet_extTrainer=/opt/venv/lib/python3.13/site-packages/nnunet_vit_mae/trainers
USER 1000:1000
WORKDIR /data
CMD ["mae3d"]
