//! `config/tier0.toml` is what the programs do without it, and every key they know stands in it.

use std::process::Command;

use playground::shipped;

pub(crate) const PROGRAMS: [&str; 6] = [
    "mqtt-consumer",
    "device-simulator",
    "rabbitmq-consumer",
    "user-simulator",
    "region-agent",
    "failover-orchestrator",
];

/// A program of ours without settings from outside, but with the secrets that it demands.
pub(crate) fn command(program: &str) -> Command {
    let mut command = Command::new(shipped::program(program).unwrap());
    let ours = std::env::vars().filter(|(name, _)| name.starts_with("TIER0_"));
    ours.for_each(|(name, _)| {
        command.env_remove(name);
    });
    // Required, and never shown.
    for (section, key) in [
        ("ORCHESTRATOR", "TOKEN"),
        ("ORCHESTRATOR", "AGENT_TOKEN"),
        ("REGION_AGENT", "TOKEN"),
        ("REGION_AGENT", "PASSWORD"),
        ("REGION_AGENT", "REPLICATION_PASSWORD"),
    ] {
        command.env(format!("TIER0__{section}__{key}"), format!("a secret of this test: {key}"));
    }
    command
}

/// `--print-config` of a program, line by line.
fn printed(program: &str, args: &[&str]) -> Vec<String> {
    let output = command(program).args(args).arg("--print-config").output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn the_shipped_file_states_the_defaults_and_every_key() {
    let path = shipped::config_path("tier0.toml").unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    for program in PROGRAMS {
        let defaults = printed(program, &[]);
        assert!(defaults.len() > 15, "{defaults:?}");
        assert_eq!(printed(program, &["--config", path.to_str().unwrap()]), defaults, "{program}");
        for line in defaults {
            let (key, _) = line.split_once(" = ").unwrap();
            let (section, key) = key.rsplit_once('.').unwrap();
            if key.ends_with("password") || key.ends_with("token") {
                continue;
            }
            let (_, rest) =
                text.split_once(&format!("[{section}]")).unwrap_or_else(|| panic!("no [{section}]"));
            let body = rest.split("\n[").next().unwrap();
            let stated =
                body.lines().any(|line| line.trim_start_matches("# ").starts_with(&format!("{key} = ")));
            assert!(stated, "{program} knows {section}.{key}, which config/tier0.toml does not state");
        }
    }
}
