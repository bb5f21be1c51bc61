//! The MQTT broker: `config/mosquitto/mosquitto.conf` plus a loopback listener and a data directory of its own.
//!
//! Runs as user `mosquitto` when we are root. The session state survives [`Mosquitto::stop`]; [`Mosquitto::kill9`]
//! loses what Mosquitto has not yet written, as it would in the field.

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

/// Loading millions of queued messages takes a while.
const READY: Duration = Duration::from_secs(60);
/// So does writing them.
const STOP: Duration = Duration::from_secs(60);

/// The broker, running or not.
#[derive(Debug)]
pub struct Mosquitto {
    dir: PathBuf,
    log: PathBuf,
    port: Port,
    account: Option<Account>,
    child: Option<Child>,
}

impl Mosquitto {
    /// A new broker for a test on a free port. `extra` are lines of its configuration, over the shipped ones.
    ///
    /// # Errors
    /// When it is not installed or does not come up.
    pub async fn start(scratch: &Scratch, extra: &[&str]) -> anyhow::Result<Self> {
        Self::open(scratch.path(), Port::free()?, extra).await
    }

    /// A broker with its data in `dir/mosquitto` and its log in `dir/mosquitto.log`.
    ///
    /// # Errors
    /// As [`Mosquitto::start`].
    pub async fn open(dir: &Path, port: Port, extra: &[&str]) -> anyhow::Result<Self> {
        let account = Account::of_server("mosquitto")?;
        let log = dir.join("mosquitto.log");
        let dir = dir.join("mosquitto");
        private_dir(&dir, account.as_ref())?;
        let mut text = shipped::config("mosquitto/mosquitto.conf")?;
        let own = format!(
            "\n# --- written at each start by the playground ---\nlistener {} 127.0.0.1\nallow_anonymous true\n\
             persistence_location {}/\n",
            port.number(),
            dir.display()
        );
        text.push_str(&own);
        for line in extra {
            text.push_str(line);
            text.push('\n');
        }
        private_file(&dir.join("mosquitto.conf"), &text, account.as_ref())?;
        let mut broker = Self { dir, log, port, account, child: None };
        broker.start_again().await?;
        Ok(broker)
    }

    /// Starts it on the same port and data, and waits until it accepts an MQTT client.
    ///
    /// # Errors
    /// When it does not come up; the message holds the end of its log.
    pub async fn start_again(&mut self) -> anyhow::Result<()> {
        if self.is_running() {
            return Ok(());
        }
        let start = Start::new("mosquitto", shipped::server("mosquitto")?, &self.log)
            .args([std::ffi::OsStr::new("-c"), self.dir.join("mosquitto.conf").as_os_str()])
            .account(self.account.clone());
        let port = self.port.number();
        let child = self.child.insert(start.spawn().await?);
        child.until("accepts an MQTT client", READY, || handshake(port)).await
    }

    /// SIGTERM: sessions and queued messages are written to disk.
    ///
    /// # Errors
    /// When it does not end in time.
    pub async fn stop(&mut self) -> anyhow::Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        let status = child.stop(Signal::SIGTERM, STOP).await?;
        if !status.success() {
            bail!("mosquitto ended with {status}{}", child.tail());
        }
        Ok(())
    }

    /// # Errors
    /// As [`Mosquitto::stop`] and [`Mosquitto::start_again`].
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        self.stop().await?;
        self.start_again().await
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
        self.port.number()
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
            ("TIER0__MQTT__HOST".into(), "127.0.0.1".into()),
            ("TIER0__MQTT__PORT".into(), self.port().to_string()),
        ]
    }
}

/// CONNECT (MQTT 3.1.1, clean session, no client id), CONNACK, DISCONNECT.
async fn handshake(port: u16) -> anyhow::Result<()> {
    const CONNECT: [u8; 14] = [0x10, 12, 0, 4, b'M', b'Q', b'T', b'T', 4, 0x02, 0, 10, 0, 0];
    const CONNACK_ACCEPTED: [u8; 4] = [0x20, 2, 0, 0];
    const DISCONNECT: [u8; 2] = [0xe0, 0];
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.context("connect")?;
    stream.write_all(&CONNECT).await.context("send CONNECT")?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).await.context("read CONNACK")?;
    if answer != CONNACK_ACCEPTED {
        bail!("the broker refused: {answer:02x?}");
    }
    stream.write_all(&DISCONNECT).await.context("send DISCONNECT")
}
