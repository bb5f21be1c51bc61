//! What an operator types.

use std::process::{Command, Output};

fn consumer(args: &[&str], env: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mqtt-consumer"))
        .args(args)
        .env_remove("TIER0_CONFIG")
        .envs(env.iter().copied())
        .output()
        .unwrap()
}

#[test]
fn bad_settings_end_at_once_with_78_and_name_the_key() {
    for (env, named) in [
        (("TIER0__MQTT__PORT", "eighteen"), "mqtt.port"),
        (("TIER0__MQTT__PROT", "1883"), "prot"),
        (("TIER0__INGEST__WRITERS", "0"), "ingest.writers"),
        (("TIER0__INGEST__QUEUE_MESSAGES", "6000"), "mqtt_consumer.receive_maximum"),
        (("TIER0__DATABASE__HOSTS", "nowhere"), "database.hosts"),
        (("TIER0__LOG__FILTER", "=="), "log.filter"),
    ] {
        let output = consumer(&[], &[env]);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(78), "{env:?}: {text}");
        assert!(text.contains(named), "{env:?}: {text}");
        assert_eq!(text.lines().count(), 1, "{env:?}: {text}");
    }
}

#[test]
fn the_settings_in_force_are_shown_without_secrets() {
    let output = consumer(&["--print-config"], &[("TIER0__DATABASE__PASSWORD", "s3cret")]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    assert!(text.contains("database.password = \"<hidden>\"") && !text.contains("s3cret"), "{text}");
    assert!(text.contains("mqtt_consumer.client_id = \"tier0-mqtt-consumer\""), "{text}");
}

#[test]
fn help_shows_examples() {
    let output = consumer(&["--help"], &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("Examples:") && text.contains("--print-config"), "{text}");
}
