//! Settings: a TOML file, the environment over it, `--set` over both; unknown keys refused.
//!
//! One file serves all processes. Each process names the sections it reads by the fields of its settings struct
//! (`deny_unknown_fields`); a section that no process knows is refused too. Environment variables are
//! `TIER0__SECTION__KEY`, for instance `TIER0__MQTT__PORT=1884`. Secrets come from the environment or from a file
//! named there (`TIER0__DATABASE__PASSWORD_FILE`), never from the TOML file.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use config::{Config, Environment, File, FileFormat, Value, ValueKind};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Every section of `config/tier0.toml`. A process reads some of them.
pub const SECTIONS: &[&str] = &[
    "log",
    "http",
    "traces",
    "database",
    "mqtt",
    "rabbitmq",
    "ingest",
    "mqtt_consumer",
    "rabbitmq_consumer",
    "device_simulator",
    "user_simulator",
    "region_agent",
    "orchestrator",
    "redis",
];

const PREFIX: &str = "TIER0";
const SECRET_KEYS: &[&str] = &["password", "token"];

/// Exit status of a process whose settings are wrong (sysexits.h, `EX_CONFIG`).
pub const EXIT_CONFIG: u8 = 78;

/// Command-line options every process takes. Flatten into the process' own `clap` struct.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct SettingsArgs {
    /// Settings file (TOML); without it the built-in defaults apply
    #[arg(long, value_name = "FILE", env = "TIER0_CONFIG", help_heading = "Settings")]
    pub config: Option<PathBuf>,
    /// Override one setting; may be repeated [example: --set mqtt.port=1884]
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE", help_heading = "Settings")]
    pub overrides: Vec<String>,
    /// Print the effective settings without secrets and exit
    #[arg(long, help_heading = "Settings")]
    pub print_config: bool,
}

/// A setting that is missing, unknown or out of range. One line that names the key.
#[derive(Debug, thiserror::Error)]
#[error("settings: {0}")]
pub struct SettingsError(pub String);

/// A struct of sections that a process reads. `check` cross-checks values that are each valid alone.
pub trait Settings: Serialize + DeserializeOwned {
    /// Names of the top-level sections, equal to the field names.
    const SECTIONS: &'static [&'static str];

    /// Cross-checks.
    ///
    /// # Errors
    /// One sentence that names the key and the bound.
    fn check(&self) -> Result<(), String>;
}

/// Reads the settings of one process.
///
/// # Errors
/// [`SettingsError`] for a file that cannot be read, a key nobody knows, a value of the wrong type or out of
/// range, a secret in the TOML file.
pub fn load<T: Settings>(
    args: &SettingsArgs,
    environment: HashMap<String, String>,
) -> Result<T, SettingsError> {
    let fail = |error: config::ConfigError| SettingsError(error.to_string());
    let mut builder = Config::builder();
    if let Some(path) = &args.config {
        let file = File::from(path.as_path()).format(FileFormat::Toml);
        refuse_secrets_in(path, file.clone())?;
        builder = builder.add_source(file);
    }
    let environment = read_secret_files(environment)?;
    builder = builder.add_source(
        Environment::with_prefix(PREFIX)
            .prefix_separator("__")
            .separator("__")
            .source(Some(environment.into_iter().collect())),
    );
    for text in &args.overrides {
        let (key, value) = text
            .split_once('=')
            .ok_or_else(|| SettingsError(format!("--set {text}: expected SECTION.KEY=VALUE")))?;
        if is_secret(key.trim().rsplit('.').next().unwrap_or(key)) {
            let message =
                format!("--set {key}: a secret on a command line is seen by everybody; use the environment");
            return Err(SettingsError(message));
        }
        builder = builder.set_override(key.trim(), value.trim()).map_err(fail)?;
    }
    let merged = builder.build().map_err(fail)?;
    let mut table = merged.cache.into_table().map_err(fail)?;
    for section in table.keys() {
        if !SECTIONS.contains(&section.as_str()) {
            return Err(SettingsError(format!(
                "unknown section [{section}]; known sections: {}",
                SECTIONS.join(", ")
            )));
        }
    }
    table.retain(|section, _| T::SECTIONS.contains(&section.as_str()));
    let settings: T = Value::new(None, ValueKind::Table(table)).try_deserialize().map_err(fail)?;
    settings.check().map_err(SettingsError)?;
    Ok(settings)
}

/// The settings in force as TOML-like lines `section.key = value`, secrets hidden.
///
/// # Errors
/// [`SettingsError`] when a value cannot be shown as text, which is a bug of the settings struct.
pub fn print<T: Serialize>(settings: &T) -> Result<String, SettingsError> {
    let value = serde_json::to_value(settings).map_err(|error| SettingsError(error.to_string()))?;
    let mut lines = Vec::new();
    flatten("", &value, &mut lines);
    Ok(lines.join("\n"))
}

fn flatten(prefix: &str, value: &serde_json::Value, lines: &mut Vec<String>) {
    match value {
        serde_json::Value::Object(map) => {
            for (key, value) in map {
                let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&name, value, lines);
            }
        }
        other => lines.push(format!("{prefix} = {other}")),
    }
}

/// `TIER0__X__PASSWORD_FILE=/path` becomes `TIER0__X__PASSWORD=<the file's text without the final newline>`.
fn read_secret_files(environment: HashMap<String, String>) -> Result<HashMap<String, String>, SettingsError> {
    let mut resolved = HashMap::with_capacity(environment.len());
    for (name, value) in environment {
        let secret = name.strip_suffix("_FILE").filter(|rest| {
            rest.starts_with("TIER0__") && is_secret(rest.rsplit("__").next().unwrap_or(rest))
        });
        match secret {
            Some(target) => {
                let text = std::fs::read_to_string(&value)
                    .map_err(|error| SettingsError(format!("{name}: cannot read {value}: {error}")))?;
                resolved.insert(target.to_owned(), text.trim_end_matches(['\r', '\n']).to_owned());
            }
            None => {
                resolved.insert(name, value);
            }
        }
    }
    Ok(resolved)
}

fn is_secret(key: &str) -> bool {
    let key = key.to_ascii_lowercase();
    SECRET_KEYS.iter().any(|secret| key == *secret || key.ends_with(&format!("_{secret}")))
}

fn refuse_secrets_in(
    path: &Path,
    file: File<config::FileSourceFile, FileFormat>,
) -> Result<(), SettingsError> {
    let parsed = Config::builder()
        .add_source(file)
        .build()
        .map_err(|error| SettingsError(format!("{}: {error}", path.display())))?;
    let table = parsed.cache.into_table().map_err(|error| SettingsError(error.to_string()))?;
    for (section, value) in table {
        let Ok(keys) = value.into_table() else { continue };
        if let Some(key) = keys.keys().find(|key| is_secret(key)) {
            return Err(SettingsError(format!(
                "{}: {section}.{key} is a secret; give it as {PREFIX}__{}__{} or {PREFIX}__{}__{}_FILE in the environment",
                path.display(),
                section.to_uppercase(),
                key.to_uppercase(),
                section.to_uppercase(),
                key.to_uppercase(),
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Secret;
    use serde::Deserialize;
    use std::io::Write;
    use std::time::Duration;

    #[derive(Debug, Default, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Sample {
        mqtt: Mqtt,
    }

    #[derive(Debug, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Mqtt {
        host: String,
        port: u16,
        password: Secret,
        #[serde(with = "humantime_serde")]
        keep_alive: Duration,
        max_packet: bytesize::ByteSize,
        tls: bool,
    }

    impl Default for Mqtt {
        fn default() -> Self {
            Self {
                host: "localhost".into(),
                port: 1883,
                password: Secret::default(),
                keep_alive: Duration::from_secs(30),
                max_packet: bytesize::ByteSize::kib(256),
                tls: false,
            }
        }
    }

    impl Settings for Sample {
        const SECTIONS: &'static [&'static str] = &["mqtt"];
        fn check(&self) -> Result<(), String> {
            if self.mqtt.keep_alive.is_zero() {
                return Err("mqtt.keep_alive must be above 0".into());
            }
            Ok(())
        }
    }

    fn environment(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    fn load_text(text: &str, env: &[(&str, &str)], set: &[&str]) -> Result<Sample, SettingsError> {
        let file = file(text);
        let args = SettingsArgs {
            config: Some(file.path().to_owned()),
            overrides: set.iter().map(|s| (*s).to_owned()).collect(),
            print_config: false,
        };
        load(&args, environment(env))
    }

    #[test]
    fn the_environment_wins_over_the_file_and_set_over_both() {
        let text = "[mqtt]\nhost = \"a\"\nport = 1\nkeep_alive = \"5s\"\nmax_packet = \"1MiB\"\n";
        let settings = load_text(
            text,
            &[("TIER0__MQTT__HOST", "b"), ("TIER0__MQTT__PORT", "2"), ("TIER0__MQTT__TLS", "true")],
            &["mqtt.port=3"],
        )
        .unwrap();
        assert_eq!(settings.mqtt.host, "b");
        assert_eq!(settings.mqtt.port, 3);
        assert!(settings.mqtt.tls);
        assert_eq!(settings.mqtt.keep_alive, Duration::from_secs(5));
        assert_eq!(settings.mqtt.max_packet.as_u64(), 1 << 20);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, env, named) in [
            ("[mqtt]\nprot = 1\n", &[][..], "prot"),
            ("[mqqt]\nport = 1\n", &[], "mqqt"),
            ("[mqtt]\nport = 99999\n", &[], "mqtt.port"),
            ("[mqtt]\nport = \"x\"\n", &[], "mqtt.port"),
            ("[mqtt]\nkeep_alive = \"0s\"\n", &[], "mqtt.keep_alive"),
            ("[mqtt]\nkeep_alive = 5\n", &[], "mqtt.keep_alive"),
            ("[mqtt]\npassword = \"x\"\n", &[], "TIER0__MQTT__PASSWORD"),
            ("", &[("TIER0__MQTT__PROT", "1")], "prot"),
            ("", &[("TIER0__MQTT__PASSWORD_FILE", "/nonexistent")], "TIER0__MQTT__PASSWORD_FILE"),
        ] {
            let error = load_text(text, env, &[]).unwrap_err().to_string();
            assert!(error.contains(named), "{text:?} {env:?}: {error}");
            assert!(!error.contains('\n'), "one line: {error}");
        }
    }

    #[test]
    fn a_secret_comes_from_a_file_and_is_never_shown() {
        let secret = file("s3cret\n");
        let path = secret.path().to_str().unwrap().to_owned();
        let settings = load_text("", &[("TIER0__MQTT__PASSWORD_FILE", &path)], &[]).unwrap();
        assert_eq!(settings.mqtt.password.expose(), "s3cret");
        let shown = print(&settings).unwrap();
        assert!(shown.contains("mqtt.password = \"<hidden>\""), "{shown}");
        assert!(!format!("{settings:?}{shown}").contains("s3cret"));
    }
}
