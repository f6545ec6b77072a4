# The trainer's image. It builds with the plain builder of engine 20.10 and with BuildKit alike:
#   docker build -t starling .
# Any Debian-like base with Python 3.11, its venv module and ca-certificates serves; torch brings CUDA from the
# package index, so the host needs only the NVIDIA driver and its container toolkit.
ARG BASE=python:3.11-slim
FROM ${BASE}

# deploy/ca holds extra certificate authorities for networks that inspect TLS; normally just a README.
COPY deploy/ca/ /usr/local/share/ca-certificates/starling/
RUN for bundle in /usr/local/share/ca-certificates/starling/*.crt; do \
        if [ -e "$bundle" ]; then cat "$bundle" >> /etc/ssl/certs/ca-certificates.crt; fi; \
    done
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
    REQUESTS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt

# A private index or mirror. Build arguments stay readable in the image's history: no passwords in these.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL

# Requirements before sources: a change of code reuses this layer. Bytecode is compiled here, on all cores, because
# the user that runs the trainer cannot write it and every container would compile torch's imports again; a package's
# files for other Pythons do not compile, and need not.
COPY requirements.txt requirements-launcher.txt /tmp/requirements/
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --no-compile --disable-pip-version-check --progress-bar off \
        -r /tmp/requirements/requirements.txt \
    && { /opt/venv/bin/python -m compileall -q -j 0 /opt/venv/lib >/dev/null || true; }

# Triton's kernels and `--compile` are translated where they run: with C and C++, and the headers of this Python, which a
# base with a Python of its own has already. COMPILER=0 leaves them out: the trainer goes on without, and says so.
ARG COMPILER=1
RUN if [ "$COMPILER" = 1 ]; then \
        apt-get update -qq \
        && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends g++ \
            $([ -x /usr/local/bin/python3 ] || echo python3-dev) >/dev/null \
        && rm -rf /var/lib/apt/lists/* /usr/src/python3*; \
    fi

# HOME and USER also serve user ids that /etc/passwd does not know (`docker run --user`); /tmp stays writable when
# the root file system is read-only.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/usr/src/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    USER=starling \
    MPLCONFIGDIR=/tmp/matplotlib \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    STARLING_RUNS=/usr/src/app/runs

COPY deploy/trainer/entrypoint.sh /usr/local/bin/starling-entrypoint
COPY datasets/bccd-mini /usr/src/datasets/bccd-mini
COPY app /usr/src/app
WORKDIR /usr/src/app

# The entry point starts as root only to become the owner of runs/, never root, and gives up every capability on the way.
# data/hyps is where command lines of the older trainers look for the shipped hyperparameters.
# Files of the host keep their paths inside, also those of a person whose home is /root: the way there must be open.
RUN chmod 0755 /usr/local/bin/starling-entrypoint \
    && chmod 0711 /root \
    && useradd --uid 1000 --user-group --no-create-home --home-dir /tmp starling \
    && install -d -o starling -g starling -m 1777 runs \
    && printf '#!/bin/sh\nexec python -P -m starling "$@"\n' >/usr/local/bin/starling \
    && chmod 0755 /usr/local/bin/starling \
    && mkdir -p data && ln -s ../starling/config/hyps data/hyps \
    && python -m compileall -q /usr/src/app

# What `launcher up` asks before it starts anything: is our trainer in the image, and which driver does its CUDA need?
# A test holds the figure to that of the torch in requirements.txt.
ARG CUDA=13.0
LABEL starling.trainer=1 \
    starling.cuda=${CUDA}

# The commit of these sources, for the trackers: no repository is in the image.
#   docker build -t starling --build-arg COMMIT=$(git describe --always --dirty --abbrev=40 --exclude='*') .
ARG COMMIT=
ENV STARLING_COMMIT=${COMMIT}
LABEL org.opencontainers.image.revision=${COMMIT}

ENTRYPOINT ["starling-entrypoint"]
CMD ["python", "train.py", "--help"]
