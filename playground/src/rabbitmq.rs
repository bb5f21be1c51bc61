//! RabbitMQ: `config/rabbitmq/rabbitmq.conf` plus loopback listeners, and everything that Erlang puts somewhere by itself put
//! into a directory of its own: node name, cookie, data, port mapper, distribution port.
//!
//! Runs as user `rabbitmq` when we are root. Queues survive [`RabbitMq::stop`] and [`RabbitMq::kill9`]. The Erlang machine
//! is our child itself (no shell script between), and so is its port mapper (epmd), which would otherwise be started in
//! the background and stay behind.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::signal::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::account::{Account, private_dir, private_file};
use crate::child::{Child, Reach, Start};
use crate::port::Port;
use crate::scratch::Scratch;
use crate::shipped;

/// An Erlang machine starts in 5 to 15 s on a busy machine.
const READY: Duration = Duration::from_secs(120);
const STOP: Duration = Duration::from_secs(60);
/// Its own tool is an Erlang machine too.
const CONTROL: Duration = Duration::from_secs(120);
/// The plugin's default.
const METRICS_PORT: u16 = 15_692;
/// The broker writes such names 3 s late at most.
const REGISTERED: Duration = Duration::from_secs(60);
/// Debian's wrapper in /usr/sbin changes the user and writes to /var/log; this is what it wraps.
const SERVER: &str = "/usr/lib/rabbitmq/bin/rabbitmq-server";

/// The ports of one broker.
#[derive(Debug)]
pub struct Ports {
    pub amqp: Port,
    pub management: Port,
    /// Of the plugin rabbitmq_prometheus; used with the management plugin only.
    pub metrics: Port,
    epmd: Port,
    distribution: Port,
}

impl Ports {
    /// Given ports for clients, that of the metrics as near as can be to the usual one; those that only Erlang uses are any free ones.
    ///
    /// # Errors
    /// When no port is free.
    pub fn new(amqp: Port, management: Port) -> anyhow::Result<Self> {
        let metrics = Port::near(METRICS_PORT)?;
        Ok(Self { amqp, management, metrics, epmd: Port::free()?, distribution: Port::free()? })
    }
}

/// The broker, running or not.
#[derive(Debug)]
pub struct RabbitMq {
    dir: PathBuf,
    log: PathBuf,
    ports: Ports,
    account: Option<Account>,
    // The server before its port mapper: dropping goes in this order.
    child: Option<Child>,
    epmd: Option<Child>,
}

impl RabbitMq {
    /// A new broker for a test on free ports, without its management plugin, which takes long to start. `extra` are lines
    /// of its configuration, over the shipped ones.
    ///
    /// # Errors
    /// When it is not installed or does not come up.
    pub async fn start(scratch: &Scratch, extra: &[&str]) -> anyhow::Result<Self> {
        let ports = Ports::new(Port::free()?, Port::free()?)?;
        Self::open(scratch.path(), ports, false, extra).await
    }

    /// A broker with its data in `dir/rabbitmq` and its log in `dir/rabbitmq.log`.
    ///
    /// # Errors
    /// As [`RabbitMq::start`].
    pub async fn open(dir: &Path, ports: Ports, management: bool, extra: &[&str]) -> anyhow::Result<Self> {
        let account = Account::of_server("rabbitmq")?;
        let log = dir.join("rabbitmq.log");
        let dir = dir.join("rabbitmq");
        private_dir(&dir, account.as_ref())?;
        let mut text = shipped::config("rabbitmq/rabbitmq.conf")?;
        text.push_str(&format!(
            "\n# --- written at each start by the playground ---\nlisteners.tcp.1 = 127.0.0.1:{}\n",
            ports.amqp.number()
        ));
        if management {
            text.push_str(&format!(
                "management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {}\n\
                 prometheus.tcp.ip = 127.0.0.1\nprometheus.tcp.port = {}\n",
                ports.management.number(),
                ports.metrics.number()
            ));
        }
        for line in extra {
            text.push_str(line);
            text.push('\n');
        }
        private_file(&dir.join("rabbitmq.conf"), &text, account.as_ref())?;
        let plugins = if management { "[rabbitmq_management,rabbitmq_prometheus].\n" } else { "[].\n" };
        private_file(&dir.join("enabled_plugins"), plugins, account.as_ref())?;
        // Without a file of our own the system's would be read.
        private_file(&dir.join("rabbitmq-env.conf"), "", account.as_ref())?;
        let mut broker = Self { dir, log, ports, account, child: None, epmd: None };
        broker.start_again().await?;
        Ok(broker)
    }

    /// Starts it on the same ports and data, and waits until it speaks AMQP.
    ///
    /// # Errors
    /// When it does not come up; the message holds the end of its log.
    pub async fn start_again(&mut self) -> anyhow::Result<()> {
        if self.is_running() {
            return Ok(());
        }
        let epmd_port = self.ports.epmd.number();
        if self.epmd.as_mut().is_none_or(|epmd| epmd.ended().is_some()) {
            let start = Start::new("epmd", shipped::server("epmd")?, &self.log)
                .args(["-port", &epmd_port.to_string(), "-address", "127.0.0.1"])
                .account(self.account.clone());
            let epmd = self.epmd.insert(start.spawn().await?);
            epmd.until("listens", READY, || async {
                TcpStream::connect(("127.0.0.1", epmd_port)).await.map(drop).context("connect")
            })
            .await?;
        }
        let port = self.port();
        let child = self.child.insert(self.server().spawn().await?);
        child.until("speaks AMQP", READY, || handshake(port)).await
    }

    fn server(&self) -> Start {
        let path = |name: &str| self.dir.join(name).into_os_string();
        let start = Start::new("rabbitmq", SERVER, &self.log)
            .account(self.account.clone())
            // The script then replaces itself by the Erlang machine instead of waiting for it.
            .env("detached", "yes")
            .env("HOME", self.dir.as_os_str())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            .env("ERL_EPMD_PORT", self.ports.epmd.number().to_string())
            .env("RABBITMQ_DIST_PORT", self.ports.distribution.number().to_string())
            .env("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", "-kernel inet_dist_use_interface {127,0,0,1}")
            .env("RABBITMQ_NODENAME", self.node())
            .env("RABBITMQ_LOGS", "-");
        [
            ("RABBITMQ_CONF_ENV_FILE", "rabbitmq-env.conf"),
            ("RABBITMQ_CONFIG_FILE", "rabbitmq.conf"),
            ("RABBITMQ_ADVANCED_CONFIG_FILE", "advanced.config"),
            ("RABBITMQ_ENABLED_PLUGINS_FILE", "enabled_plugins"),
            ("RABBITMQ_GENERATED_CONFIG_DIR", "generated"),
            ("RABBITMQ_MNESIA_BASE", "mnesia"),
            ("RABBITMQ_LOG_BASE", "log"),
            ("RABBITMQ_PID_FILE", "pid"),
        ]
        .into_iter()
        .fold(start, |start, (variable, name)| start.env(variable, path(name)))
    }

    /// The name must stay: the data belongs to it. Ports may change from run to run, so it is not made of them.
    fn node(&self) -> &'static str {
        "tier0@localhost"
    }

    /// Waits until the broker would know this quorum queue again after a kill.
    ///
    /// Before RabbitMQ 4.0 (`ra` 2.11) a new queue's name goes to disk up to 3 s after it was declared, its messages at once:
    /// killed in between, the broker starts the queue as a new, empty one that never elects a leader. What it confirmed
    /// by then is lost, and no client can tell (docs/decisions/0006-sessions.md).
    ///
    /// # Errors
    /// When the queue is not declared, or not one of the default virtual host's quorum queues.
    pub async fn until_registered(&mut self, queue: &str) -> anyhow::Result<()> {
        let names = self.dir.join(format!("mnesia/{0}/quorum/{0}/names.dets", self.node()));
        let entry = registration(queue)?;
        let child = self.child.as_mut().context("rabbitmq does not run")?;
        child
            .until("has the queue's name on disk", REGISTERED, || async {
                let held =
                    tokio::fs::read(&names).await.with_context(|| format!("read {}", names.display()))?;
                if held.windows(entry.len()).any(|part| part == entry) {
                    return Ok(());
                }
                bail!("{queue} is not in {}", names.display())
            })
            .await
    }

    /// `rabbitmqctl` against this broker.
    ///
    /// # Errors
    /// When it fails; the message holds the end of the broker's log, to which it writes.
    pub async fn control(&self, args: &[&str]) -> anyhow::Result<()> {
        Start::new("rabbitmqctl", "/usr/lib/rabbitmq/bin/rabbitmqctl", &self.log)
            .account(self.account.clone())
            .env("HOME", self.dir.as_os_str())
            .env("ERL_EPMD_PORT", self.ports.epmd.number().to_string())
            .env("RABBITMQ_CONF_ENV_FILE", self.dir.join("rabbitmq-env.conf").into_os_string())
            .args(["-n", self.node()])
            .args(args.iter().copied())
            .run(CONTROL)
            .await
    }

    /// SIGTERM: the broker ends in order.
    ///
    /// # Errors
    /// When it does not end in time.
    pub async fn stop(&mut self) -> anyhow::Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        let status = child.stop(Signal::SIGTERM, STOP).await?;
        if !status.success() {
            bail!("rabbitmq ended with {status}{}", child.tail());
        }
        if let Some(mut epmd) = self.epmd.take() {
            epmd.kill9(Reach::Tree).await?;
        }
        Ok(())
    }

    /// # Errors
    /// When the process stays.
    pub async fn kill9(&mut self) -> anyhow::Result<()> {
        match self.child.take() {
            Some(mut child) => child.kill9(Reach::Tree).await,
            None => Ok(()),
        }
    }

    /// SIGSTOP: accepts connections (the kernel does), answers nothing.
    pub fn pause(&mut self) {
        if let Some(child) = &mut self.child {
            child.pause(Reach::Tree);
        }
    }

    pub fn resume(&mut self) {
        if let Some(child) = &mut self.child {
            child.resume();
        }
    }

    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| child.ended().is_none())
    }

    #[must_use]
    pub fn port(&self) -> u16 {
        self.ports.amqp.number()
    }

    #[must_use]
    pub fn management_port(&self) -> u16 {
        self.ports.management.number()
    }

    /// Where Prometheus finds it, when it was opened with its management plugin.
    #[must_use]
    pub fn metrics_port(&self) -> u16 {
        self.ports.metrics.number()
    }

    /// `None` when it is not running.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.child.as_ref().map(Child::pid)
    }

    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The settings by which our processes find this broker.
    #[must_use]
    pub fn environment(&self) -> Vec<(String, String)> {
        vec![
            ("TIER0__RABBITMQ__HOST".into(), "127.0.0.1".into()),
            ("TIER0__RABBITMQ__PORT".into(), self.port().to_string()),
        ]
    }
}

/// A quorum queue's entry in the broker's table of names, as far as it is the same in all: the atom with its length, then
/// the tag of a binary.
fn registration(queue: &str) -> anyhow::Result<Vec<u8>> {
    let name = format!("%2F_{queue}");
    let length = u8::try_from(name.len()).with_context(|| format!("{name} is too long for an atom"))?;
    Ok([&[length], name.as_bytes(), b"m"].concat())
}

/// The protocol header; a broker that is ready answers with Connection.Start (class 10, method 10) on channel 0.
async fn handshake(port: u16) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.context("connect")?;
    stream.write_all(b"AMQP\0\0\x09\x01").await.context("send the protocol header")?;
    let mut answer = [0; 11];
    stream.read_exact(&mut answer).await.context("read Connection.Start")?;
    match answer {
        [1, 0, 0, _, _, _, _, 0, 10, 0, 10] => Ok(()),
        other => bail!("the broker answered {other:02x?}"),
    }
}
