//! `user-simulator`: the command line. Flags become settings; everything else is in the library.

use std::process::ExitCode;

use clap::Parser;
use service::process;
use service::settings::SettingsArgs;
use simulators::user::run::run;
use simulators::user::settings::UserSimulatorSettings;

const EXAMPLES: &str = "\
Examples:
  user-simulator                                   1,000 users, 100 messages/s, to 127.0.0.1:5672
  user-simulator --for 60s --ledger sessions.json  one minute, with a ledger
  user-simulator --rate max --count 100000         as fast as the broker confirms them
  user-simulator --queue webapp_active_users       another queue
  user-simulator --trouble out_of_order=0.05 --trouble duplicate=0.05 --trouble not_json=0.01

Faults (fractions of all messages): out_of_order, duplicate, not_json, missing_field, wrong_type, far_future.
Every flag is a setting of section [user_simulator]; --print-config shows all.
SIGTERM drains: the process waits for outstanding confirms, then writes the ledger and the summary.";

/// Publishes the activity of simulated users of ten web sites to RabbitMQ and writes a ledger of what the
/// broker confirmed.
#[derive(Debug, Parser)]
#[command(name = "user-simulator", version, about, after_help = EXAMPLES)]
struct Args {
    /// Host name or address of the broker [default: 127.0.0.1]
    #[arg(long)]
    host: Option<String>,
    /// Port of the broker [default: 5672]
    #[arg(long)]
    port: Option<u16>,
    /// Queue to publish to [default: user_activity_queue]
    #[arg(long)]
    queue: Option<String>,
    /// Number of users [default: 1000]
    #[arg(long)]
    users: Option<u32>,
    /// Messages per second, or `max` [default: 100]
    #[arg(long)]
    rate: Option<String>,
    /// The same seed gives the same activity and faults [default: 1]
    #[arg(long)]
    seed: Option<u64>,
    /// Stop after this time, for example 60s
    #[arg(long = "for", value_name = "TIME")]
    run_for: Option<String>,
    /// Stop after this many messages
    #[arg(long)]
    count: Option<u64>,
    /// Write the ledger of confirmed messages to this file
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
        for (key, value) in [
            ("rabbitmq.host", self.host),
            ("rabbitmq.port", self.port.map(|port| port.to_string())),
            ("rabbitmq.queue", self.queue),
            ("user_simulator.users", self.users.map(|users| users.to_string())),
            ("user_simulator.rate", self.rate),
            ("user_simulator.seed", self.seed.map(|seed| seed.to_string())),
            ("user_simulator.run_for", self.run_for),
            ("user_simulator.count", self.count.map(|count| count.to_string())),
            ("user_simulator.ledger", self.ledger),
            ("user_simulator.summary", self.summary),
        ] {
            settings.overrides.extend(value.map(|value| format!("{key}={value}")));
        }
        settings
            .overrides
            .extend(self.trouble.into_iter().map(|trouble| format!("user_simulator.trouble.{trouble}")));
        settings
    }
}

fn main() -> ExitCode {
    let settings = Args::parse().into_settings();
    process::main(&settings, |settings: &UserSimulatorSettings| &settings.log, run)
}
