//! `docs/metrics.md`: every series of every process, from what its components register, and who looks at it.

pub mod users;

use std::collections::BTreeMap;
use std::fmt::Write;

use consumers::pipeline::Pipeline;
use consumers::{mqtt, rabbitmq};
use failover::{agent, orchestrator};
use ingest::settings::{DatabaseSettings, IngestSettings};
use ingest::{session, telemetry};
use service::health::Health;
use service::http;
use service::metrics::{Registry, Series};
use service::process::Process;
use service::traces::{TraceSettings, Tracer};
use simulators::{device, user};

use users::Users;

const HEAD: &str = "\
# Metrics

Each process serves its metrics in the Prometheus text format at `/metrics` on its `http.port`. `tier0 status` lists the ports. `make up` runs a
Prometheus that scrapes all of them. Prometheus adds the labels `job` (the program) and `instance` (the process: `mqtt-consumer-1`, `region1`). A
histogram `x` has the series `x_bucket`, `x_sum` and `x_count`. Names contain the unit: `_seconds`, `_bytes`. Counters end in `_total`. The exporters
of the servers describe their own metrics (`pg_`, `redis_`, `rabbitmq_`, `node_`).

The last column lists the panels of [grafana/dashboards](../grafana/dashboards/), and the alerts and recorded series of
[config/prometheus/rules](../config/prometheus/rules/), that use a metric. The [runbooks](runbooks/README.md) explain the alerts.

This page is generated from the registries of the processes (`make docs`).
";

/// One process and its registry, filled by the components themselves. Nothing is connected to; must be called within a
/// runtime.
///
/// # Errors
/// When two components of a process claim one name.
pub fn registries() -> anyhow::Result<Vec<(&'static str, Registry)>> {
    let device = Registry::new();
    device::metrics::Metrics::new(&device)?;
    let user = http::registry()?;
    user::metrics::Metrics::new(&user)?;
    let agent = http::registry()?;
    agent::metrics::Metrics::new(&agent)?;
    let orchestrator = http::registry()?;
    orchestrator::metrics::Metrics::new(&orchestrator)?;
    trace(&orchestrator)?;
    let telemetry = consumer::<telemetry::Batch>(true)?;
    mqtt::metrics::SourceMetrics::new(&telemetry)?;
    let activity = consumer::<session::Batch>(false)?;
    rabbitmq::metrics::SourceMetrics::new(&activity)?;
    Ok(vec![
        ("mqtt-consumer", telemetry),
        ("rabbitmq-consumer", activity),
        ("device-simulator", device),
        ("user-simulator", user),
        ("region-agent", agent),
        ("failover-orchestrator", orchestrator),
    ])
}

fn trace(registry: &Registry) -> anyhow::Result<Tracer> {
    Tracer::start(&TraceSettings::default(), "docs", registry, &mut Process::default())
}

fn consumer<B: ingest::batch::Batch>(partitions: bool) -> anyhow::Result<Registry> {
    let registry = http::registry()?;
    let pipeline = Pipeline {
        source: "docs",
        // Nobody is there; and the tasks end with the process, at once.
        database: &DatabaseSettings { hosts: "127.0.0.1:1".into(), ..DatabaseSettings::default() },
        ingest: &IngestSettings::default(),
        migrate: false,
        partitions,
        tracer: &trace(&registry)?,
    };
    pipeline.start::<B>(&registry, &Health::default(), &mut Process::default())?;
    Ok(registry)
}

/// Each series with the processes that have it.
fn by_processes(registries: &[(&'static str, Registry)]) -> Vec<(Vec<&'static str>, Vec<Series>)> {
    let mut processes: BTreeMap<Series, Vec<&'static str>> = BTreeMap::new();
    for (process, registry) in registries {
        for series in registry.series() {
            processes.entry(series).or_default().push(process);
        }
    }
    let mut groups: Vec<(Vec<&'static str>, Vec<Series>)> = Vec::new();
    for (series, of) in processes {
        match groups.iter_mut().find(|(group, _)| *group == of) {
            Some((_, all)) => all.push(series),
            None => groups.push((of, vec![series])),
        }
    }
    let place = |of: &[&str]| registries.iter().position(|(process, _)| of.first() == Some(process));
    groups.sort_by_key(|(of, _)| (std::cmp::Reverse(of.len()), place(of)));
    groups
}

fn unit(name: &str) -> &'static str {
    let base = name.strip_suffix("_total").unwrap_or(name);
    if base.ends_with("_seconds") {
        "seconds"
    } else if base.ends_with("_bytes") {
        "bytes"
    } else {
        "number"
    }
}

/// The page.
///
/// # Errors
/// When dashboards or rules cannot be read, or a series has no help text. Needs a runtime.
pub fn page() -> anyhow::Result<String> {
    let registries = registries()?;
    let users = Users::load()?;
    let mut page = String::from(HEAD);
    for (of, all) in by_processes(&registries) {
        let title = if of.len() == registries.len() { "Every process".into() } else { of.join(", ") };
        write!(
            page,
            "\n## {title}\n\n| series | type | labels | description | used by |\n|---|---|---|---|---|\n"
        )?;
        for Series { name, kind, labels, help } in all {
            anyhow::ensure!(help.len() > 3, "{name} of {title} has no help text");
            let labels: Vec<String> = labels.iter().map(|label| format!("`{label}`")).collect();
            let help = help.trim_end_matches('.').replace('|', "\\|");
            let readers = users.of(&name);
            writeln!(
                page,
                "| `{name}` | {kind}, {} | {} | {help} | {readers} |",
                unit(&name),
                labels.join(", ")
            )?;
        }
    }
    page.push_str("\n## Recorded series\n\n| series | from | used by |\n|---|---|---|\n");
    let series = registries.iter().flat_map(|(_, registry)| registry.series());
    for (name, from) in users.recorded(&series.map(|series| series.name).collect()) {
        let from: Vec<String> = from.iter().map(|name| format!("`{name}`")).collect();
        writeln!(page, "| `{name}` | {} | {} |", from.join(", "), users.of(name))?;
    }
    Ok(page)
}
