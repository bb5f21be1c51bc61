//! Options of `tier0 up`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::terminal::time;

/// Options of `up`.
#[derive(Debug, Clone, Args)]
pub struct UpArgs {
    /// Stop after this time, counted from the first message [example: 60s]
    #[arg(long = "for", value_name = "TIME", value_parser = time)]
    pub duration: Option<Duration>,
    /// Number of devices
    #[arg(long, value_name = "N")]
    pub devices: Option<u32>,
    /// Time between two readings of one device [example: 5s]
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub interval: Option<Duration>,
    /// Messages per second, regardless of the interval; `max` is as fast as the broker accepts them
    #[arg(long, value_name = "N|max")]
    pub rate: Option<String>,
    /// MQTT quality of service of the devices: 0 or 1
    #[arg(long, value_name = "0|1", value_parser = clap::value_parser!(u8).range(0..=1))]
    pub qos: Option<u8>,
    /// Seed of all random values
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Leave out a process and everything that needs it (rabbitmq: rabbitmq-consumer, user-simulator); may be
    /// repeated
    #[arg(long, value_name = "NAME")]
    pub without: Vec<Part>,
    /// Write the final summary as JSON
    #[arg(long, value_name = "FILE")]
    pub summary: Option<PathBuf>,
    /// Delete the data of earlier runs first
    #[arg(long)]
    pub fresh: bool,
    /// Print plain lines instead of the full-screen view, also on a terminal
    #[arg(long)]
    pub no_ui: bool,
    /// Arguments for device-simulator [example: tier0 up -- --trouble duplicate=0.01]
    #[arg(last = true)]
    pub simulator_args: Vec<String>,
}

/// What can be left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    DeviceSimulator,
    MqttConsumer,
    Mosquitto,
    UserSimulator,
    RabbitmqConsumer,
    Rabbitmq,
    /// Prometheus and its exporters
    Monitoring,
    /// The standby in region2: commits then wait for one machine only
    Region2,
}
