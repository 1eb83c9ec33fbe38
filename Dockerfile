# The environment of the lock in a container, for clusters and workstations: docs/harness/cluster.md says how to use it.
#   docker build -t foldopt .
#   docker run --gpus all -v "$PWD/results:/foldopt/results" foldopt make figures
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /foldopt
COPY requirements.lock pyproject.toml README.md LICENSE Makefile ./
COPY scripts/find_python scripts/find_python
COPY foldopt foldopt
RUN make .venv/.installed
COPY . .
RUN touch .venv/.installed
ENV PATH=/foldopt/.venv/bin:$PATH
CMD ["make", "help"]
