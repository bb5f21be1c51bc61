//! Two regions under their agents and the orchestrator, writers, and a person with a shell who follows the pages.

use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use failover_api::Status;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use playground::cluster::{Cluster, Options};
use playground::metrics::Metrics;
use playground::port::Port;
use playground::postgres::Role;
use playground::process::Process;
use playground::regions::{CONTRACT, Plan, Regions};
use playground::scratch::Scratch;
use playground::{http, shipped};
use tier0::home::{Home, Lock, State};
use tokio::io::AsyncWriteExt;

use super::book::Book;
use super::shell::{Said, Shell};
use super::writers::Writers;
use crate::examples::pages::Page;

pub(super) const LIMIT: Duration = Duration::from_secs(120);
const POSTGRES: [u16; 2] = [5432, 5433];
/// What kept-source starts beside the nodes.
const COPY: u16 = 5439;

/// Dropped in this order.
pub(super) struct Bed {
    pub(super) writers: Option<Writers>,
    pub(super) shell: Shell,
    pub(super) regions: Regions,
    pub(super) cluster: Cluster,
    _copy: Copy,
    _lock: Lock,
    pub(super) scratch: Scratch,
}

/// The copy of kept data, which the shell has started and nobody ends when a test fails.
struct Copy {
    port: Port,
    data: PathBuf,
}

impl Drop for Copy {
    fn drop(&mut self) {
        let lock = std::fs::read_to_string(self.data.join("postmaster.pid")).unwrap_or_default();
        if let Some(pid) = lock.lines().next().and_then(|pid| pid.parse().ok()) {
            // SIGQUIT: it frees its shared memory.
            let _gone = kill(Pid::from_raw(pid), Signal::SIGQUIT);
        }
    }
}

impl Bed {
    pub(super) async fn start(plan: Plan) -> Self {
        let scratch = Scratch::new().unwrap();
        let mut cluster = Cluster::start(&scratch, Options::default()).await.unwrap();
        let mut db = cluster.connect(Role::Owner).await.unwrap();
        ingest::schema::migrate(&mut db).await.unwrap();
        let any =
            "CREATE TABLE any_time PARTITION OF device_telemetry FOR VALUES FROM (MINVALUE) TO (MAXVALUE)";
        db.batch_execute(any).await.unwrap();
        drop(db);
        cluster.hand_over().await.unwrap();
        let mut regions = Regions::start(scratch.path(), &mut cluster, plan).await.unwrap();
        if let Some(redis) = &mut regions.redis {
            redis.settled(LIMIT).await.unwrap();
        }
        regions.whole(LIMIT).await.unwrap();
        let copy = Copy { port: Port::free().unwrap(), data: scratch.path().join("region1-kept") };
        let (lock, shell) = desk(&scratch, &cluster, &regions, &copy.port).await;
        let writers = Some(Writers::start(&cluster).await);
        let mut bed = Self { writers, shell, regions, cluster, _copy: copy, _lock: lock, scratch };
        // Before anything: what the README has people paste.
        let readme = Page::open("docs/runbooks/README.md");
        let block = readme.blocks.iter().find(|block| block.text.starts_with("sql()")).unwrap();
        bed.paste(&block.text).await;
        bed.paste("PATH=target/release:$PATH").await;
        bed
    }

    /// Does what a part of a page says, in its order; all that was printed.
    pub(super) async fn follow(&mut self, book: &mut Book, part: &str) -> String {
        let mut all = String::new();
        for command in book.take(part) {
            all.push_str(&self.paste(&command).await);
        }
        all
    }

    /// As [`Bed::follow`], where something that is asked may be down.
    pub(super) async fn look(&mut self, book: &mut Book) -> String {
        let mut all = String::new();
        for command in book.take("Diagnosis") {
            let (output, failed) = self.run(&command).await;
            println!("$ {command}\n{output}{failed}");
            all.push_str(&output);
        }
        all
    }

    async fn paste(&mut self, command: &str) -> String {
        let (output, failed) = self.run(command).await;
        println!("$ {command}\n{output}");
        assert!(failed.is_empty(), "{command}\n{output}\nfailed: {failed}");
        output
    }

    async fn run(&mut self, command: &str) -> (String, String) {
        self.shell.paste(command).await;
        let mut printed = String::new();
        loop {
            match self.shell.next(&mut printed).await {
                Said::Done { output, failed } => return (output, failed),
                Said::Docker(words, mut caller) => {
                    let answer = match self.docker(&words).await {
                        Ok(()) => "done\n".to_owned(),
                        Err(error) => format!("{error:#}\n").replace('\n', " ") + "\n",
                    };
                    caller.write_all(answer.as_bytes()).await.unwrap();
                }
            }
        }
    }

    /// A service of docker-compose.yml is a process of ours.
    async fn docker(&mut self, words: &str) -> anyhow::Result<()> {
        let regions = &mut self.regions;
        match words.split(' ').collect::<Vec<_>>()[..] {
            ["compose", "up", "-d", "failover-orchestrator"] => regions.orchestrator.restart().await,
            ["compose", "up", "-d", region] if region.starts_with("region") => {
                regions.agent(region)?.restart().await
            }
            ["compose", "stop", region] if region.starts_with("region") => {
                regions.agent(region)?.terminate(LIMIT).await
            }
            ["compose", "up", "-d", name] => {
                let redis = regions.redis.as_mut().unwrap();
                let mut all = redis.instances.iter_mut().chain(&mut redis.sentinels);
                let server = all.find(|server| server.name() == name);
                server.unwrap_or_else(|| panic!("who is {name}?")).start_again().await
            }
            _ => anyhow::bail!("nobody can do this here: {words}"),
        }
    }

    pub(super) async fn until(&self, what: &str, condition: impl Fn(&Status) -> bool) -> Status {
        self.regions.until(what, LIMIT, condition).await.unwrap()
    }

    pub(super) async fn alarm(&self, part: &str) -> Status {
        let says = |status: &Status| status.alarms.iter().any(|alarm| alarm.contains(part));
        self.until(&format!("an alarm with {part:?}"), says).await
    }

    /// Until `condition` holds of what every process exports: agents, then the orchestrator.
    pub(super) async fn metrics(&self, what: &str, condition: impl Fn(&[Metrics], &Metrics) -> bool) {
        let deadline = Instant::now() + LIMIT;
        loop {
            let mut agents = Vec::new();
            for agent in &self.regions.agents {
                agents.extend(agent.metrics().await);
            }
            if let Ok(orchestrator) = self.regions.orchestrator.metrics().await
                && condition(&agents, &orchestrator)
            {
                return;
            }
            assert!(Instant::now() < deadline, "not within {LIMIT:?}: {what}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// `sum(region_agent_postgres_writable)`, of the agents that answer.
    pub(super) async fn writable_are(&self, wanted: u64) {
        self.metrics(&format!("{wanted} writable"), |agents, _| {
            agents.iter().map(|agent| agent.count("region_agent_postgres_writable")).sum::<u64>() == wanted
        })
        .await;
    }

    /// The agent of a region and its Postgres, at one stroke.
    pub(super) async fn kill_node(&mut self, region: &str) {
        self.regions.agent(region).unwrap().kill9().await.unwrap();
    }

    pub(super) async fn post(&self, path: &str, body: &str) {
        let token = self.regions.token().unwrap();
        let (code, answer) =
            http::post(self.regions.orchestrator.port(), path, &token, body, LIMIT).await.unwrap();
        assert_eq!(code, 200, "{path}: {answer}");
    }

    /// Nodes that accept writes now, asked directly.
    pub(super) async fn writable(&self) -> Vec<String> {
        self.cluster.writable().await
    }

    /// This node accepts writes, and no other one does.
    pub(super) async fn leads_alone(&self, region: &str) {
        self.cluster.leads_alone(region, LIMIT).await.unwrap();
    }

    /// Writes go on.
    pub(super) async fn commits(&self) {
        self.writers.as_ref().unwrap().commit_after(Instant::now()).await;
    }

    /// Both nodes have everything that was acknowledged, once.
    pub(super) async fn nothing_is_lost(mut self) {
        let ledger = self.writers.take().unwrap().finish().await;
        let status = self.regions.whole(LIMIT).await.unwrap();
        self.cluster.led_by(&status.current_region).unwrap();
        self.cluster.wait_replayed(LIMIT).await.unwrap();
        for node in &self.cluster.nodes {
            ledger.check(node.name(), &node.connect(Role::Owner).await.unwrap()).await;
        }
        let history = self.regions.history().await.unwrap();
        assert!(history.verification.unwrap().intact);
    }
}

/// A directory that looks like the root of the project in which `tier0 up` runs, and a shell in it.
async fn desk(scratch: &Scratch, cluster: &Cluster, regions: &Regions, copy: &Port) -> (Lock, Shell) {
    let desk = scratch.path().join("desk");
    std::fs::create_dir_all(desk.join("target")).unwrap();
    std::fs::create_dir_all(desk.join(".tier0")).unwrap();
    let programs = shipped::program("tier0").unwrap();
    symlink(programs.parent().unwrap(), desk.join("target/release")).unwrap();
    symlink(scratch.path(), desk.join(".tier0/data")).unwrap();
    let home = Home::open(&desk.join(".tier0")).unwrap();
    let lock = home.lock().unwrap().expect("nobody else owns it");
    let pid = i32::try_from(std::process::id()).unwrap();
    let orchestrator = &regions.orchestrator;
    let mut processes = vec![Process::new(orchestrator.name(), pid, orchestrator.port(), orchestrator.log())];
    processes
        .extend(cluster.nodes.iter().map(|node| Process::new(node.name(), pid, node.port(), node.log())));
    let up = Some(Process::new("up", pid, 0, orchestrator.log()));
    home.write_state(&State { up, processes }).unwrap();
    let mut words = vec![(CONTRACT.orchestrator, orchestrator.port()), (COPY, copy.number())];
    words.extend(POSTGRES.into_iter().zip(cluster.nodes.iter().map(|node| node.port())));
    words.extend(CONTRACT.agents.into_iter().zip(regions.agents.iter().map(|agent| agent.port())));
    if let Some(redis) = &regions.redis {
        let servers = redis.instances.iter().chain(&redis.sentinels);
        words.extend(CONTRACT.redis.into_iter().zip(servers.map(|server| server.port())));
    }
    let words = words.into_iter().map(|(page, here)| (page.to_string(), here.to_string())).collect();
    (lock, Shell::open(&desk, words).await)
}
