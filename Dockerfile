# llamacli serve in a container: see "Run it as a service" in README.md.
#
#   docker build -t llamacli .
#   docker run --rm -v llamacli:/var/lib/llamacli llamacli keys create --name laptop
#   docker run -d -p 8080:8080 -v llamacli:/var/lib/llamacli -e LLAMACLI_MODEL=tiny --stop-timeout 40 llamacli

ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
# Compiled for any x86-64 CPU since 2013 (AVX2), or any 64-bit ARM: an image may run on another machine than it was
# built on. Faster, for this machine's CPU alone: --build-arg CMAKE_ARGS=-DGGML_NATIVE=on. Older CPUs:
# --build-arg CMAKE_ARGS="-DGGML_NATIVE=off -DGGML_AVX2=off -DGGML_FMA=off -DGGML_F16C=off -DGGML_BMI2=off".
ARG CMAKE_ARGS="-DGGML_NATIVE=off"
# Debian keeps one version of each in a release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# By itself, because it takes minutes: done again only when pyproject.toml or CMAKE_ARGS change.
COPY pyproject.toml ./
RUN llama_cpp=$(sed -n 's/^ *"\(llama-cpp-python==[^"]*\)".*/\1/p' pyproject.toml) \
    && pip wheel --no-cache-dir --wheel-dir /wheels "${llama_cpp:?is not in pyproject.toml}"
COPY README.md LICENSE ./
COPY models/tiny-llama2-chat.Q8_0.gguf models/
COPY llamacli llamacli
RUN pip wheel --no-cache-dir --find-links /wheels --wheel-dir /wheels . \
    && python -m venv /opt/llamacli \
    && /opt/llamacli/bin/pip install --no-cache-dir --no-index --find-links /wheels llamacli

FROM python:${PYTHON}-slim
# llama.cpp's threads.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 llamacli \
    && useradd --uid 10001 --gid llamacli --no-log-init --shell /usr/sbin/nologin \
        --create-home --home-dir /var/lib/llamacli llamacli
COPY --from=build /opt/llamacli /opt/llamacli
ENV PATH=/opt/llamacli/bin:$PATH \
    LLAMACLI_HOME=/var/lib/llamacli
# By number, so that an orchestrator can see that it is not root.
USER 10001:10001
WORKDIR /var/lib/llamacli
# Models, keys and usage.
VOLUME /var/lib/llamacli
EXPOSE 8080
# Whether the model is loaded. The time to start is for a model that is being downloaded.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=8 \
    CMD ["python", "-c", "from http.client import HTTPConnection as C; c = C('127.0.0.1', 8080, timeout=4); c.request('GET', '/ready'); raise SystemExit(c.getresponse().status != 200)"]
# No shell: SIGTERM reaches the server, which finishes its answers.
ENTRYPOINT ["llamacli"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8080"]
