# syntax=docker/dockerfile:1.7
# All programs of Tier0. Targets: `processes` (consumers, orchestrator, simulators) and `postgres` (the same, with Postgres
# 15 for the region-agent). docker-compose.yml builds both.

ARG RUST=1.95
FROM rust:${RUST}-bookworm AS build
WORKDIR /src
# Line tables would double the size of the image; a panic still names file and line.
ENV CARGO_PROFILE_DIST_STRIP=debuginfo CARGO_INCREMENTAL=0
# Dependencies first, from the manifests alone, each crate an empty one: this layer is made anew only when a manifest or
# Cargo.lock changes.
COPY Cargo.toml Cargo.lock ./
COPY crates/amqp/Cargo.toml crates/amqp/
COPY crates/service/Cargo.toml crates/service/
COPY crates/wire/Cargo.toml crates/wire/
COPY ingest/Cargo.toml ingest/
COPY consumers/Cargo.toml consumers/
COPY simulators/Cargo.toml simulators/
COPY failover/Cargo.toml failover/
COPY playground/Cargo.toml playground/
COPY tier0/Cargo.toml tier0/
RUN for manifest in */Cargo.toml crates/*/Cargo.toml; do crate=${manifest%Cargo.toml}; mkdir -p "${crate}src" && touch "${crate}src/lib.rs"; done
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    cargo build --profile dist --locked --workspace --lib
# The real sources, made newer than what was built from the empty ones: cargo goes by times.
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    find . -path ./target -prune -o -type f -exec touch {} + \
    && cargo build --profile dist --locked --bins \
    && mkdir /out \
    && find target/dist -maxdepth 1 -type f -perm -u+x ! -name '*.so' -exec cp {} /out/ \;

FROM debian:bookworm-slim AS processes
LABEL org.opencontainers.image.title="Tier0" org.opencontainers.image.licenses="Apache-2.0"
# The orchestrator's directory is there in both images, so that its volume belongs to it whoever mounts it first.
RUN groupadd --gid 10001 tier0 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin tier0 \
    && install -d -o 10001 -g 10001 -m 0755 /var/lib/tier0-orchestrator
COPY config/compose/healthcheck /usr/local/bin/healthcheck
COPY config/tier0.toml /etc/tier0/tier0.toml
COPY --from=build /out/ /usr/local/bin/
USER 10001:10001
CMD ["mqtt-consumer", "--help"]

FROM processes AS postgres
USER root
# The account first, with a number that stays; no cluster is made by the package, no policy starts one.
RUN groupadd --gid 10002 postgres && useradd --uid 10002 --gid 10002 --no-create-home --home-dir /var/lib/postgresql --shell /usr/sbin/nologin postgres \
    && mkdir -p /etc/postgresql-common && echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf \
    && apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends -o Dpkg::Options::=--force-confold postgresql-15 \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o 10002 -g 10002 -m 0700 /var/lib/tier0 /var/log/tier0
USER 10002:10002
CMD ["region-agent", "--help"]
