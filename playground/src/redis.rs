//! Redis: a master, a replica, and three Sentinels that agree by two.
//!
//! Region N has the N-th instance; the first is master at first start. Runs as user `redis` when we are root.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::account::{Account, private_dir, private_file};
use crate::child::{Child, POLL, Reach, Start};
use crate::port::Port;
use crate::scratch::Scratch;
use crate::shipped;

/// The name the Sentinels know the master by.
pub const MASTER: &str = "tier0";
const QUORUM: usize = 2;
const READY: Duration = Duration::from_secs(120);
const STOP: Duration = Duration::from_secs(60);
const ANSWER: Duration = Duration::from_secs(2);
/// For what is not asked a second time, because it may have been carried out.
const COMMAND: Duration = Duration::from_secs(30);

/// One Redis or Sentinel, running or not.
#[derive(Debug)]
pub struct Server {
    name: String,
    dir: PathBuf,
    log: PathBuf,
    port: Port,
    account: Option<Account>,
    sentinel: bool,
    child: Option<Child>,
}

/// Everything. Dropping it kills it.
#[derive(Debug)]
pub struct Redis {
    pub instances: Vec<Server>,
    pub sentinels: Vec<Server>,
}

impl Redis {
    /// New ones for a test, on free ports.
    ///
    /// # Errors
    /// When Redis is not installed or does not come up.
    pub async fn start(scratch: &Scratch) -> anyhow::Result<Self> {
        let ports = (0..5).map(|_| Port::free()).collect::<anyhow::Result<_>>()?;
        let mut redis = Self::open(scratch.path(), ports, 0).await?;
        redis.wait_whole().await?;
        Ok(redis)
    }

    /// With data in `dir/redis-region1` and so on: ports of two instances, then of three Sentinels. `master` is the index
    /// of the instance that begins as such; what they last agreed on is forgotten, their data is kept. Returns when each
    /// answers; the Sentinels take some seconds more to find one another ([`Redis::settled`]).
    ///
    /// # Errors
    /// As [`Redis::start`].
    pub async fn open(dir: &Path, ports: Vec<Port>, master: usize) -> anyhow::Result<Self> {
        let mut ports = ports.into_iter();
        let mut next = || ports.next().context("five ports");
        let mut instances = Vec::new();
        for region in 1..=2 {
            instances.push(Server::new(dir, &format!("redis-region{region}"), next()?, false)?);
        }
        let master = instances.get(master).context("an instance")?.port();
        for server in &instances {
            server.configure_instance(Some(master).filter(|port| *port != server.port()))?;
        }
        let mut sentinels = Vec::new();
        for number in 1..=3 {
            let server = Server::new(dir, &format!("sentinel-{number}"), next()?, true)?;
            server.configure_sentinel(master)?;
            sentinels.push(server);
        }
        let mut redis = Self { instances, sentinels };
        for server in redis.instances.iter_mut().chain(&mut redis.sentinels) {
            server.start_again().await?;
        }
        Ok(redis)
    }

    /// The port of the master, by the Sentinels.
    ///
    /// # Errors
    /// When none of them answers.
    pub async fn master(&self) -> anyhow::Result<u16> {
        let mut failure = anyhow::anyhow!("no Sentinel");
        for sentinel in &self.sentinels {
            match sentinel.named_master().await {
                Ok(port) => return Ok(port),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    /// How many Sentinels say that the master is on this port.
    pub async fn agreeing(&self, port: u16) -> usize {
        let mut agree = 0;
        for sentinel in &self.sentinels {
            agree += usize::from(sentinel.named_master().await.is_ok_and(|named| named == port));
        }
        agree
    }

    /// Waits until there is one master, of which the other is a replica, and the Sentinels say so too.
    ///
    /// # Errors
    /// When it is not so within `limit`.
    pub async fn settled(&mut self, limit: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let named = self.master().await.unwrap_or_default();
            let mut roles = Vec::new();
            for server in &self.instances {
                roles.push((server.port() == named, server.role().await.unwrap_or_default()));
            }
            let fits = |(named, role): &(bool, String)| role == if *named { "master" } else { "slave" };
            if roles.iter().all(fits) && roles.iter().any(|(named, _)| *named) {
                return self.wait_whole().await;
            }
            if Instant::now() > deadline {
                bail!("Redis is not settled within {limit:?}: {roles:?}");
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Kills the master; its index.
    ///
    /// # Errors
    /// When no Sentinel answers or the process stays.
    pub async fn kill_master(&mut self) -> anyhow::Result<usize> {
        let port = self.master().await?;
        let found = self.instances.iter().position(|server| server.port() == port);
        let index =
            found.with_context(|| format!("the Sentinels name a master on {port}, which is not ours"))?;
        self.instances.get_mut(index).context("an instance")?.kill9().await?;
        Ok(index)
    }

    /// Waits until another instance than this one is master, by its own word and by the Sentinels'.
    ///
    /// # Errors
    /// When it is not so within `limit`.
    pub async fn replaced(&self, killed: usize, limit: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let named = self.master().await.unwrap_or_default();
            for (index, server) in self.instances.iter().enumerate() {
                let master = index != killed && server.port() == named;
                if master && server.role().await.is_ok_and(|role| role == "master") {
                    return Ok(());
                }
            }
            if Instant::now() > deadline {
                bail!("the Redis master was not replaced within {limit:?}");
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Starts an instance that was killed.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn restart(&mut self, index: usize) -> anyhow::Result<()> {
        self.instances.get_mut(index).context("an instance")?.start_again().await
    }

    /// Stops all of it, Sentinels first.
    ///
    /// # Errors
    /// When one does not end in time; the others are stopped all the same.
    pub async fn stop(&mut self) -> anyhow::Result<()> {
        let mut outcome = Ok(());
        for server in self.sentinels.iter_mut().chain(&mut self.instances) {
            outcome = outcome.and(server.stop().await);
        }
        outcome
    }

    /// The settings by which the orchestrator finds this.
    #[must_use]
    pub fn environment(&self) -> Vec<(String, String)> {
        let list = |servers: &[Server], prefix: &str| {
            let addresses = servers.iter().enumerate().map(|(index, server)| {
                let name = if prefix.is_empty() { String::new() } else { format!("{prefix}{}=", index + 1) };
                format!("{name}127.0.0.1:{}", server.port())
            });
            addresses.collect::<Vec<_>>().join(",")
        };
        vec![
            ("TIER0__REDIS__SENTINELS".into(), list(&self.sentinels, "")),
            ("TIER0__REDIS__INSTANCES".into(), list(&self.instances, "region")),
            ("TIER0__REDIS__MASTER".into(), MASTER.into()),
        ]
    }

    /// Waits until every Sentinel knows the others and a replica that is in step: before, it would refuse a failover.
    async fn wait_whole(&mut self) -> anyhow::Result<()> {
        for sentinel in &mut self.sentinels {
            let port = sentinel.port();
            let child = sentinel.child.as_mut().context("a Sentinel that runs")?;
            child
                .until("knows the replica and the other Sentinels", READY, || async move {
                    let quorum = ask(port, &format!("SENTINEL CKQUORUM {MASTER}")).await?;
                    let peers = ask(port, &format!("SENTINEL SENTINELS {MASTER}")).await?;
                    let replicas = ask(port, &format!("SENTINEL REPLICAS {MASTER}")).await?;
                    if !quorum.starts_with("+OK 3") || peers.matches("runid").count() < QUORUM {
                        bail!("{}", quorum.trim());
                    }
                    if !replicas.contains("master-link-status\r\n$2\r\nok") {
                        bail!("the replica is not in step yet");
                    }
                    Ok(())
                })
                .await?;
        }
        Ok(())
    }
}

impl Server {
    fn new(dir: &Path, name: &str, port: Port, sentinel: bool) -> anyhow::Result<Self> {
        let account = Account::of_server("redis")?;
        let log = dir.join(format!("{name}.log"));
        let dir = dir.join(name);
        private_dir(&dir, account.as_ref())?;
        Ok(Self { name: name.into(), dir, log, port, account, sentinel, child: None })
    }

    /// Redis and Sentinel write what they learn into this file.
    fn configure_instance(&self, replica_of: Option<u16>) -> anyhow::Result<()> {
        let mut text = format!(
            "port {}\nbind 127.0.0.1\ndir {}\nappendonly yes\nappendfsync everysec\nsave \"\"\nrepl-diskless-sync-delay 0\n\
             repl-ping-replica-period 1\nmin-replicas-to-write 0\n",
            self.port(),
            self.dir.display()
        );
        if let Some(port) = replica_of {
            text.push_str(&format!("replicaof 127.0.0.1 {port}\n"));
        }
        self.configure(&text)
    }

    fn configure_sentinel(&self, master: u16) -> anyhow::Result<()> {
        self.configure(&format!(
            "port {}\nbind 127.0.0.1\ndir {}\nsentinel monitor {MASTER} 127.0.0.1 {master} {QUORUM}\n\
             sentinel down-after-milliseconds {MASTER} 1000\nsentinel failover-timeout {MASTER} 5000\n\
             sentinel parallel-syncs {MASTER} 1\n",
            self.port(),
            self.dir.display()
        ))
    }

    fn configure(&self, text: &str) -> anyhow::Result<()> {
        let path = self.dir.join("server.conf");
        private_file(&path, text, self.account.as_ref())
    }

    /// Starts it on the same port and data, and waits until it answers.
    ///
    /// # Errors
    /// When it does not come up; the message holds the end of its log.
    pub async fn start_again(&mut self) -> anyhow::Result<()> {
        if self.is_running() {
            return Ok(());
        }
        let program = shipped::server(if self.sentinel { "redis-sentinel" } else { "redis-server" })?;
        let start = Start::new(&self.name, program, &self.log)
            .args([self.dir.join("server.conf").into_os_string()])
            .account(self.account.clone());
        let port = self.port.number();
        let child = self.child.insert(start.spawn().await?);
        child
            .until("answers PING", READY, || async move {
                match ask(port, "PING").await?.trim() {
                    "+PONG" => Ok(()),
                    other => bail!("{other}"),
                }
            })
            .await
    }

    /// # Errors
    /// When it does not end in time.
    pub async fn stop(&mut self) -> anyhow::Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        child.stop(Signal::SIGTERM, STOP).await.map(drop)
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
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `None` when it is not running.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.child.as_ref().map(Child::pid)
    }

    #[must_use]
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The port of the master, by this Sentinel.
    async fn named_master(&self) -> anyhow::Result<u16> {
        let answer = ask(self.port(), &format!("SENTINEL GET-MASTER-ADDR-BY-NAME {MASTER}")).await?;
        let port = answer.lines().filter_map(|line| line.trim().parse().ok()).next_back();
        port.with_context(|| format!("no port in {answer:?}"))
    }

    /// The raw answer to a command in Redis' inline form: a test's hand on one server.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn command(&self, command: &str) -> anyhow::Result<String> {
        ask_within(self.port(), command, COMMAND).await
    }

    /// `master` or `slave`, by the server itself.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn role(&self) -> anyhow::Result<String> {
        let answer = ask(self.port(), "ROLE").await?;
        let role = answer.lines().find(|line| matches!(*line, "master" | "slave"));
        role.map(str::to_owned).with_context(|| format!("no role in {answer:?}"))
    }
}

/// One command in Redis' inline form, and its raw answer.
async fn ask(port: u16, command: &str) -> anyhow::Result<String> {
    ask_within(port, command, ANSWER).await
}

async fn ask_within(port: u16, command: &str, limit: Duration) -> anyhow::Result<String> {
    let exchange = async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.context("connect")?;
        stream.write_all(format!("{command}\r\n").as_bytes()).await.context("send")?;
        // The end of what we say: it answers what it has and closes. (A Sentinel knows no QUIT.)
        stream.shutdown().await.context("send")?;
        let mut answer = String::new();
        stream.take(1 << 20).read_to_string(&mut answer).await.context("read")?;
        Ok(answer)
    };
    tokio::time::timeout(limit, exchange).await.context("no answer")?
}
