# The project with all its packages, in the versions of constraints.txt; works where it lies:
#
#     docker build -t e2lora .
#     docker run --rm --gpus all --shm-size 8g -v "$PWD/results:/home/e2lora/app/results" \
#         e2lora python jobs/search.py
#
# Nodes of a Ray cluster run the same image: deploy/kuberay/rayjob.yaml. No secret is needed to
# build it, and none belongs into it.
FROM python:3.11-slim

# Where torch comes from. PyPI has the GPU build; without GPUs 2 GB less are enough:
#     docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t e2lora .
ARG TORCH_INDEX=https://pypi.org/simple

ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONPATH=/home/e2lora/app

# torch.compile and triton compile what they write
RUN apt-get update -qq \
    && apt-get install -yqq --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# A number, so that Kubernetes can tell that it isn't root; KubeRay's own images have the same.
RUN useradd --uid 1000 --create-home e2lora
WORKDIR /home/e2lora/app
RUN chown e2lora:e2lora .

# Packages before code: a change of code builds no new layer of gigabytes.
COPY pyproject.toml constraints.txt ./
RUN pip install --no-deps --constraint constraints.txt --index-url "$TORCH_INDEX" torch \
    && python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*project['dependencies'], *project['optional-dependencies']['qlora'], sep='\n')" \
        > /tmp/requirements.txt \
    && pip install --constraint constraints.txt --requirement /tmp/requirements.txt \
    && rm /tmp/requirements.txt

COPY --chown=e2lora:e2lora . .
USER 1000
CMD ["python", "jobs/search.py"]
