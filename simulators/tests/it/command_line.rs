//! Flags, settings and their errors.

use std::process::{Command, Output};

fn simulator(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_device-simulator")).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn help_has_examples_and_version_a_number() {
    let help = simulator(&["--help"]);
    assert!(help.status.success());
    assert!(text(&help.stdout).contains("device-simulator --rate max --count 1000000"));
    let version = simulator(&["--version"]);
    assert_eq!(text(&version.stdout).trim(), concat!("device-simulator ", env!("CARGO_PKG_VERSION")));
}

#[test]
fn flags_are_settings() {
    let flags = [
        "--host",
        "broker",
        "--port",
        "1884",
        "--devices",
        "7",
        "--interval",
        "2s",
        "--array",
        "3",
        "--qos",
        "0",
        "--seed",
        "9",
        "--connections",
        "2",
        "--for",
        "60s",
        "--count",
        "5",
        "--ledger",
        "a.json",
        "--summary",
        "b.json",
        "--trouble",
        "late=0.5",
        "--rate",
        "max",
        "--print-config",
    ];
    let output = simulator(&flags);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let shown = text(&output.stdout);
    for line in [
        "mqtt.host = \"broker\"",
        "mqtt.port = 1884",
        "device_simulator.devices = 7",
        "device_simulator.interval = \"2s\"",
        "device_simulator.array = 3",
        "device_simulator.qos = 0",
        "device_simulator.seed = 9",
        "device_simulator.connections = 2",
        "device_simulator.run_for = \"1m\"",
        "device_simulator.count = 5",
        "device_simulator.ledger = \"a.json\"",
        "device_simulator.summary = \"b.json\"",
        "device_simulator.rate = \"max\"",
        "device_simulator.trouble.late = 0.5",
        "mqtt.password = \"\"",
    ] {
        assert!(shown.lines().any(|shown| shown == line), "{line} in\n{shown}");
    }
}

#[test]
fn bad_settings_are_one_line_and_status_78() {
    for (args, named) in [
        (&["--qos", "2"][..], "device_simulator.qos"),
        (&["--rate", "fast"], "device_simulator.rate"),
        (&["--trouble", "gremlins=1"], "gremlins"),
        (&["--set", "device_simulator.tick=0s"], "device_simulator.tick"),
        (&["--set", "mqtt.port=0"], "mqtt.port"),
    ] {
        let output = simulator(args);
        assert_eq!(output.status.code(), Some(78), "{args:?}");
        let error = text(&output.stderr);
        assert!(error.contains(named) && error.trim().lines().count() == 1, "{error}");
    }
}

#[test]
fn more_connections_than_files_is_a_clear_error() {
    let output = simulator(&["--devices", "3000000", "--connections", "3000000"]);
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(
        error.contains("device_simulator.connections = 3000000 needs") && error.contains("ulimit"),
        "{error}"
    );
}

#[test]
fn a_ledger_that_cannot_be_written_is_an_error() {
    // Nobody listens on port 1: it fails before it needs a broker.
    let output = simulator(&["--port", "1", "--ledger", "/nonexistent/ledger.json"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("/nonexistent/ledger.json"), "{}", text(&output.stderr));
}
