//! `device-simulator`: the command line. Flags become settings; everything else is in the library.

use std::process::ExitCode;

use clap::Parser;
use service::process;
use service::settings::SettingsArgs;
use simulators::device::run::run;
use simulators::device::settings::DeviceSimulatorSettings;

const EXAMPLES: &str = "\
Examples:
  device-simulator                                 100,000 devices, each once in 5 s, QoS 1, to 127.0.0.1:1883
  device-simulator --for 60s --ledger ledger.json  the same for a minute, with a ledger
  device-simulator --active 1000                   1,000 messages per 5 s, the devices take turns
  device-simulator --rate max --count 1000000      a million messages as fast as the broker accepts them
  device-simulator --array 100 --rate 500          arrays of 100 readings each
  device-simulator --connections 5000 --devices 5000                     a connection per device
  device-simulator --trouble not_json=0.01 --trouble duplicate=0.05      injected faults

Faults (fractions of all messages): not_json, wrong_type, missing_field, topic_mismatch, nul_character, huge_number, too_large,
too_old, far_future, late, duplicate. Every flag is a setting of section [device_simulator]; --print-config shows all.
Environment: TIER0__MQTT__HOST, TIER0__MQTT__PASSWORD, TIER0__DEVICE_SIMULATOR__DEVICES and so on.";

/// Publishes the telemetry of a fleet of simulated devices over MQTT 5 and writes a ledger of what the broker
/// acknowledged.
#[derive(Debug, Parser)]
#[command(name = "device-simulator", version, about, after_help = EXAMPLES)]
struct Args {
    /// Host name or address of the broker [default: 127.0.0.1]
    #[arg(long)]
    host: Option<String>,
    /// Port of the broker [default: 1883]
    #[arg(long)]
    port: Option<u16>,
    /// Number of devices [default: 100000]
    #[arg(long)]
    devices: Option<u32>,
    /// Time in which each device publishes once [default: 5s]
    #[arg(long)]
    interval: Option<String>,
    /// Number of messages per interval; the devices take turns
    #[arg(long)]
    active: Option<u32>,
    /// Messages per second of all devices together, or `max`
    #[arg(long)]
    rate: Option<String>,
    /// Readings per message; above 1 each message is a JSON array, like a gateway's upload [default: 1]
    #[arg(long)]
    array: Option<u16>,
    /// MQTT quality of service, 0 or 1 [default: 1]
    #[arg(long)]
    qos: Option<u8>,
    /// The same seed gives the same values and faults [default: 1]
    #[arg(long)]
    seed: Option<u64>,
    /// MQTT connections [default: 16]
    #[arg(long)]
    connections: Option<u32>,
    /// Stop after this time, for example 60s
    #[arg(long = "for", value_name = "TIME")]
    run_for: Option<String>,
    /// Stop after this many messages
    #[arg(long)]
    count: Option<u64>,
    /// Write the ledger of acknowledged messages to this file
    #[arg(long, value_name = "FILE")]
    ledger: Option<String>,
    /// Write the final figures to this file, as JSON
    #[arg(long, value_name = "FILE")]
    summary: Option<String>,
    /// Inject faults; may be repeated
    #[arg(long, value_name = "KIND=RATE")]
    trouble: Vec<String>,
    #[command(flatten)]
    settings: SettingsArgs,
}

impl Args {
    /// Flags as overrides, after those of `--set`.
    fn into_settings(self) -> SettingsArgs {
        let mut settings = self.settings;
        let mut set = |key: &str, value: Option<String>| {
            if let Some(value) = value {
                settings.overrides.push(format!("{key}={value}"));
            }
        };
        let text = |value: Option<u64>| value.map(|value| value.to_string());
        set("mqtt.host", self.host);
        set("mqtt.port", text(self.port.map(Into::into)));
        set("device_simulator.devices", text(self.devices.map(Into::into)));
        set("device_simulator.interval", self.interval);
        set("device_simulator.active", text(self.active.map(Into::into)));
        set("device_simulator.rate", self.rate);
        set("device_simulator.array", text(self.array.map(Into::into)));
        set("device_simulator.qos", text(self.qos.map(Into::into)));
        set("device_simulator.seed", text(self.seed));
        set("device_simulator.connections", text(self.connections.map(Into::into)));
        set("device_simulator.run_for", self.run_for);
        set("device_simulator.count", text(self.count));
        set("device_simulator.ledger", self.ledger);
        set("device_simulator.summary", self.summary);
        for trouble in self.trouble {
            settings.overrides.push(format!("device_simulator.trouble.{trouble}"));
        }
        settings
    }
}

fn main() -> ExitCode {
    let settings = Args::parse().into_settings();
    process::main(&settings, |settings: &DeviceSimulatorSettings| &settings.log, run)
}
