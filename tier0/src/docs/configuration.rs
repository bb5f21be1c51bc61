//! `docs/configuration.md` and `config/tier0.toml`, from the settings types: their doc comments, types and defaults.

mod read;

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::Context;
use consumers::{mqtt, rabbitmq};
use failover::{agent, orchestrator};
use service::settings::SECTIONS;
use simulators::{device, user};

pub use read::{Key, Process, Section};

/// How `config/tier0.toml` is laid out. Every section of [`SECTIONS`] stands in one of them.
const GROUPS: [(&str, &[&str]); 6] = [
    ("every process", &["log", "http", "traces"]),
    ("servers", &["database", "mqtt", "rabbitmq"]),
    ("messages to rows", &["ingest", "mqtt_consumer", "rabbitmq_consumer"]),
    ("failover", &["region_agent", "orchestrator", "redis"]),
    ("the fleet", &["device_simulator"]),
    ("the users", &["user_simulator"]),
];

const FILE_HEAD: &str = "\
# Settings of all Tier0 processes. One file serves them all; each reads its own sections.
#
# What stands here are the built-in defaults; change what you need and delete the rest if you like. Keys that have no default
# are commented out. The environment goes over this file: TIER0__MQTT__PORT=1884; `--set mqtt.port=1884` goes over both.
# `PROGRAM --print-config` shows what holds. Unknown keys are refused. Secrets do not stand here but come from the environment:
# TIER0__DATABASE__PASSWORD=.. or TIER0__DATABASE__PASSWORD_FILE=..
#
# Made by `make docs` from the settings types, as is docs/configuration.md.
";

const PAGE_HEAD: &str = "\
# Configuration

Every process reads one TOML file (`--config FILE` or `TIER0_CONFIG`), of which [config/tier0.toml](../config/tier0.toml) states the
defaults, each its own sections. The environment goes over the file (`TIER0__MQTT__PORT=1884`), `--set mqtt.port=1884` over both.
`PROGRAM --print-config` shows what holds, secrets hidden. A key or section nobody knows, and a value out of range, is one line
that names it, and exit status 78.

Times are `50ms`, `30s`, `15m`, `24h`, `7d`; sizes `64MiB` or `256KiB`. **Secrets** never stand in the file or on a command line: give
the variable named below, or the same with `_FILE` at its end and the path of a file that holds the secret.

This page is made from the settings types (`make docs`).
";

/// The six processes and what each reads.
#[must_use]
pub fn processes() -> Vec<Process> {
    vec![
        Process::of::<mqtt::settings::MqttConsumerSettings>("mqtt-consumer"),
        Process::of::<rabbitmq::settings::RabbitConsumerSettings>("rabbitmq-consumer"),
        Process::of::<device::settings::DeviceSimulatorSettings>("device-simulator"),
        Process::of::<user::settings::UserSimulatorSettings>("user-simulator"),
        Process::of::<agent::settings::AgentSettings>("region-agent"),
        Process::of::<orchestrator::settings::OrchestratorSettings>("failover-orchestrator"),
    ]
}

/// A section with who reads it.
struct Shared<'p> {
    section: &'p Section,
    readers: Vec<&'static str>,
}

fn shared(processes: &[Process]) -> BTreeMap<&str, Shared<'_>> {
    let mut sections: BTreeMap<&str, Shared<'_>> = BTreeMap::new();
    for process in processes {
        for section in &process.sections {
            let entry =
                sections.entry(&section.name).or_insert_with(|| Shared { section, readers: Vec::new() });
            entry.readers.push(process.name);
        }
    }
    sections
}

fn readers(shared: &Shared<'_>, processes: &[Process]) -> String {
    if shared.readers.len() == processes.len() { "every process".into() } else { shared.readers.join(", ") }
}

/// `docs/configuration.md`.
///
/// # Errors
/// When a section is in no group, or no process reads it.
pub fn page(processes: &[Process]) -> anyhow::Result<String> {
    let sections = shared(processes);
    let mut page = String::from(PAGE_HEAD);
    for (group, names) in GROUPS {
        write!(
            page,
            "\n## {}{}\n",
            group.get(..1).unwrap_or_default().to_uppercase(),
            group.get(1..).unwrap_or_default()
        )?;
        for name in names {
            let shared = sections.get(name).with_context(|| format!("no process reads [{name}]"))?;
            page_section(&mut page, shared.section, Some(&readers(shared, processes)))?;
        }
    }
    Ok(page)
}

fn page_section(page: &mut String, section: &Section, readers: Option<&str>) -> anyhow::Result<()> {
    write!(page, "\n### [{}]\n\n{}", section.name, section.doc)?;
    if let Some(readers) = readers {
        write!(page, " Read by {readers}.")?;
    }
    page.push_str("\n\n| key | type | default | environment | what it does |\n|---|---|---|---|---|\n");
    for key in &section.keys {
        let default = match &key.default {
            _ if key.is_secret() => "none".to_owned(),
            Some(default) if default == "\"\"" => "empty".to_owned(),
            Some(default) => format!("`{}`", default.trim_matches('"')),
            None => "none".to_owned(),
        };
        let variable = variable(&section.name, &key.name);
        writeln!(
            page,
            "| `{}` | {} | {default} | `{variable}` | {} |",
            key.name,
            key.kind,
            key.doc.replace('|', "\\|")
        )?;
    }
    for inner in &section.inner {
        page_section(page, inner, None)?;
    }
    Ok(())
}

fn variable(section: &str, key: &str) -> String {
    format!("TIER0__{}__{}", section.replace('.', "__").to_uppercase(), key.to_uppercase())
}

/// `config/tier0.toml`.
///
/// # Errors
/// As [`page`].
pub fn toml(processes: &[Process]) -> anyhow::Result<String> {
    let sections = shared(processes);
    let grouped: usize = GROUPS.iter().map(|(_, names)| names.len()).sum();
    anyhow::ensure!(
        grouped == SECTIONS.len() && sections.len() == SECTIONS.len(),
        "{} sections are known, {} are read by somebody, {grouped} have a place in tier0.toml",
        SECTIONS.len(),
        sections.len()
    );
    let mut file = String::from(FILE_HEAD);
    for (group, names) in GROUPS {
        writeln!(file, "\n# --- {group} {}", "-".repeat(WIDTH.saturating_sub(group.len() + 7)))?;
        for name in names {
            let shared = sections.get(name).with_context(|| format!("no process reads [{name}]"))?;
            let readers = format!("Read by {}.", readers(shared, processes));
            toml_section(&mut file, shared.section, &readers)?;
        }
    }
    Ok(file)
}

const WIDTH: usize = 118;
/// Where comments beside a value begin.
const COMMENT_AT: usize = 36;

fn toml_section(file: &mut String, section: &Section, readers: &str) -> anyhow::Result<()> {
    file.push('\n');
    comment(file, format!("{} {readers}", section.doc).trim_end())?;
    writeln!(file, "[{}]", section.name)?;
    for key in section.keys.iter().filter(|key| !key.is_secret()) {
        let line = match (&key.default, &key.example) {
            (Some(default), _) => format!("{} = {default}", key.name),
            (None, Some(example)) => format!("# {} = {example}", key.name),
            (None, None) => {
                anyhow::bail!("{}.{} has neither a default nor an example", section.name, key.name)
            }
        };
        let beside = format!("{line:<width$} # {}", key.doc, width = COMMENT_AT - 1);
        if beside.len() <= WIDTH {
            writeln!(file, "{beside}")?;
        } else {
            comment(file, &key.doc)?;
            writeln!(file, "{line}")?;
        }
    }
    let secrets: Vec<String> = section
        .keys
        .iter()
        .filter(|key| key.is_secret())
        .map(|key| variable(&section.name, &key.name))
        .collect();
    if !secrets.is_empty() {
        comment(
            file,
            &format!("Secrets, from the environment: {} (or the same with _FILE).", secrets.join(", ")),
        )?;
    }
    for inner in &section.inner {
        toml_section(file, inner, "")?;
    }
    Ok(())
}

/// As comment lines of bounded length.
fn comment(file: &mut String, text: &str) -> std::fmt::Result {
    let mut line = String::from("#");
    for word in text.split_whitespace() {
        if line.len() > 1 && line.len() + 1 + word.len() > WIDTH {
            writeln!(file, "{line}")?;
            line = String::from("#");
        }
        write!(line, " {word}")?;
    }
    writeln!(file, "{line}")
}
