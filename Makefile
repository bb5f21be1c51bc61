# What people and CI run. Options of `tier0` through ARGS: make up ARGS="--for 60s --fresh"

CARGO ?= cargo
ARGS ?=
BUDGET ?= 2,1,1,1,0
# What is measured and what is shipped; what `make up` starts is built without link-time optimisation.
DIST = $(CARGO) build --profile dist --locked --bins

.PHONY: up test check install install-test build dist secrets device bench bench-growth bench-sessions bench-failover drill \
	drill-outages drill-failover drill-hand model simulate fuzz properties docs audit down clean

# Without the pinned toolchain and without a network to fetch it from, rustup's default one does; its lints may differ.
ifneq ($(shell $(CARGO) --version >/dev/null 2>&1 || echo missing),)
export RUSTUP_TOOLCHAIN := $(shell cd / && rustup show active-toolchain 2>/dev/null | cut -d' ' -f1)
$(warning the toolchain of rust-toolchain.toml is not installed: using $(RUSTUP_TOOLCHAIN))
endif

# In order, also with -j: the steps install, check and build for one another.
.NOTPARALLEL:

# The whole system on this machine, live; Ctrl-C drains and verifies.
up: install
	$(CARGO) build --release --locked --bins
	target/release/tier0 up $(ARGS)

# Everything that must hold before a change goes in. .ci/run calls this and nothing else.
test: install install-test check build
	.ci/mosquitto.sh
	.ci/compose.py
	.ci/regions.sh
	$(CARGO) test --workspace --locked --no-fail-fast

# Formatting, lints, the architecture's invariants: no server needed.
check:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	.ci/architecture.sh --self-test
	.ci/architecture.sh
	.ci/prometheus.sh
	.ci/licences.py
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" $(CARGO) doc --workspace --no-deps --document-private-items --locked --quiet

# The programs that integration tests start.
build:
	$(CARGO) build --workspace --locked --bins

# The programs as they are shipped, into target/dist/.
dist:
	$(DIST)

# Debian packages this machine lacks.
install:
	@command -v $(CARGO) >/dev/null || { echo "a Rust toolchain is needed: https://rustup.rs" >&2; exit 1; }
	@playground/install.sh

# What the checks of the deployment need besides.
install-test:
	@playground/install.sh test

# How fast, beside what the machine's parts can do alone; writes target/bench.json.
bench:
	@playground/install.sh bench
	$(DIST)
	target/dist/tier0 bench $(ARGS)

# How the rates hold to 50 million rows; writes target/growth.json and target/growth.svg. A quarter of an hour, 80 GB of disk.
bench-growth: install
	$(DIST)
	target/dist/tier0 bench-growth $(ARGS)

# The same for user activity through RabbitMQ; writes target/bench-sessions.json.
bench-sessions: install
	$(DIST)
	target/dist/tier0 bench-sessions $(ARGS)

# How long nobody can write when a region is lost, beside Postgres' own floor; writes target/bench-failover.json. Eight minutes.
bench-failover: install
	$(DIST)
	target/dist/tier0 bench-failover $(ARGS)

# Both drills: half an hour and five minutes.
drill: drill-outages drill-failover

# Each part taken away for a minute under load. One of them: make drill-outages ARGS="--only postgres-away"
drill-outages: install
	$(CARGO) build --release --locked --bins
	target/release/tier0 drill outages --json target/outages.json $(ARGS)

# Random faults on two regions; their seed is printed. Again with it: make drill-failover ARGS="--seed 42"
drill-failover: install
	$(CARGO) build --release --locked --bins
	target/release/tier0 drill failover $(ARGS)

# Coverage-guided fuzzing of decoders, topics, timestamps, MQTT packets and COPY, each for SECONDS (60). One of them:
# make fuzz TARGETS=decode SECONDS=600. Needs cargo-fuzz (`cargo install --locked cargo-fuzz`) and a C++ compiler.
fuzz:
	.ci/fuzz.sh $(or $(SECONDS),60) $(TARGETS)

# The property tests of decoder, topics, timestamps and encodings, a thousand times longer than in `make test`.
properties:
	PROPTEST_CASES=$(or $(CASES),300000) $(CARGO) test --release --locked -p ingest -p wire --lib

# The failover's hostile world: 3,000 seeds are in `make test`. SEEDS=FROM..TO runs others.
simulate:
	TIER0_SEEDS=$(or $(SEEDS),0..300000) $(CARGO) test --workspace --locked --lib hands_that -- --nocapture

# The exhaustive model of the failover's decisions, within another budget: BUDGET=commits,breaks,mishaps,acts,restores.
model:
	TIER0_BUDGET=$(BUDGET) $(CARGO) test --workspace --locked --lib within_a_budget -- --nocapture

# The failover's drills by hand on real processes (also in `make test`): promotions, restored state, a second orchestrator.
drill-hand: install build
	$(CARGO) test --package failover --locked --test it -- hand:: stalls:: disks:: --include-ignored --nocapture

# The files that are made from the code: config/tier0.toml, docs/configuration.md, docs/metrics.md. A test compares them.
docs:
	$(CARGO) run --locked --package tier0 --bin tier0 -- docs

# Licences, sources, bans and known weaknesses of all crates: needs cargo-deny (`cargo install --locked cargo-deny`) and GitHub.
audit:
	$(CARGO) deny --all-features check

# Passwords and tokens for `docker compose up`, into secrets/ and .env; makes what is missing. ARGS=--simulators for theirs.
secrets:
	config/compose/make-secrets.py $(ARGS)

# A device's account on the broker, or a new password for it: make device ID=TURB-00417
device:
	config/compose/make-secrets.py --device "$(ID)"

# End what `make up` started in another terminal, in order.
down:
	target/release/tier0 down

clean:
	$(CARGO) clean
