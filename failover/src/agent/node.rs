//! One Postgres as its parent sees it: starting, signalling, noticing its end, running the tools that rebuild it.
//!
//! Everything here is short; whoever wants to wait for the outcome watches [`Shared`]. The two exceptions, the tools,
//! run in tasks of their own and end in a state like everything else.

mod tools;

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use failover_api::Node;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::process::Command;
use tokio_util::task::TaskTracker;

use crate::agent::conf::{Conf, names};
use crate::agent::procs;
use crate::agent::settings::RegionAgent;
use crate::agent::shared::Shared;
use crate::orchestrator::store;
use crate::protocol::{Code, Command as Order, Control, Postmaster, Rejoin, Stop, Upstream};
use tools::{Tools, spawn};

/// How often the data of a stopped node is looked at.
const FOREIGN: Duration = Duration::from_millis(500);
/// Less than this, a segment of WAL, and nothing can grow.
const ROOM: u64 = 4 << 20;

/// What the agent must not forget.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Durable {
    epoch: u64,
    /// Id of the one that is obeyed; empty before the first order.
    orchestrator: String,
    /// A tool has begun to rewrite the data and has not been seen to end well: it must not be started.
    rebuilding: Option<Rejoin>,
    /// See [`crate::protocol::NodeStatus::estranged`].
    estranged: bool,
    /// See [`crate::protocol::NodeStatus::touched`].
    touched: bool,
    /// See [`crate::protocol::NodeStatus::alone`].
    alone: bool,
}

/// The node.
#[derive(Debug)]
pub struct Postgres {
    settings: RegionAgent,
    conf: Conf,
    pub shared: Arc<Shared>,
    tasks: TaskTracker,
    durable: Mutex<Durable>,
    /// The file may say what Postgres was not told.
    config_unconfirmed: AtomicBool,
    /// Of the postmaster, while it has not been reaped.
    pid: Arc<Mutex<Option<Pid>>>,
}

impl Postgres {
    /// # Errors
    /// When the agent's directory or the password file cannot be written.
    pub fn new(settings: &RegionAgent, boot: u64, tasks: TaskTracker) -> anyhow::Result<Self> {
        std::fs::create_dir_all(&settings.state)
            .with_context(|| format!("create {} (region_agent.state)", settings.state.display()))?;
        let path = settings.state.join("agent.json");
        let durable: Durable = match std::fs::read(&path) {
            Ok(text) => {
                serde_json::from_slice(&text).with_context(|| format!("understand {}", path.display()))?
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Durable::default(),
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        let shared = Arc::new(Shared::new(&settings.node, boot, durable.epoch));
        shared.change(|status| {
            (status.estranged, status.touched) = (durable.estranged, durable.touched);
            status.alone = durable.alone;
            status.orchestrator.clone_from(&durable.orchestrator);
        });
        Ok(Self {
            settings: settings.clone(),
            conf: Conf::new(settings)?,
            shared,
            tasks,
            durable: Mutex::new(durable),
            config_unconfirmed: AtomicBool::new(false),
            pid: Arc::default(),
        })
    }

    /// Looks at what is there, without starting anything. An earlier agent's postmaster was told to stop by the
    /// kernel when that agent ended; its end is awaited. One that stays is somebody else's.
    ///
    /// # Errors
    /// When what is left of a postmaster cannot be cleared up.
    pub async fn inspect(&self) -> anyhow::Result<()> {
        let deadline = tokio::time::Instant::now() + self.settings.grace;
        while !procs::inside(&self.settings.data).is_empty() {
            if tokio::time::Instant::now() > deadline {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        procs::forget_dead(&self.settings.data)?;
        self.note_foreign();
        // What it follows is of the past by now, but where its WAL came from.
        let upstream = self.conf.upstream().filter(|_| self.conf.is_standby());
        self.shared.change(|status| status.upstream = upstream);
        let control = self.clone_for_tools().settled_control().await;
        self.shared.postmaster(Postmaster::Stopped { exit: None, clean: false, settled: true }, control);
        Ok(())
    }

    /// Looks for a postmaster on our data that we have not started, and says so. True when there is one.
    pub fn note_foreign(&self) -> bool {
        let ours = *self.pid.lock().unwrap_or_else(PoisonError::into_inner);
        let found = procs::postmaster(&self.settings.data).filter(|pid| Some(*pid) != ours).map(Pid::as_raw);
        if self.shared.status().foreign != found {
            match found {
                Some(pid) => {
                    tracing::error!(pid, "a postmaster that this agent has not started runs on its data")
                }
                None => tracing::warn!("the postmaster that this agent had not started is gone"),
            }
            self.shared.change(|status| status.foreign = found);
        }
        if found.is_some() {
            self.set_touched(true);
        }
        found.is_some()
    }

    /// What the commits of this primary were told to wait for, when they wait for less.
    fn waits_for_less(&self, status: &crate::protocol::NodeStatus) -> Option<String> {
        let told = self.conf.waits()?;
        let sample = status.sample.as_ref().filter(|_| status.is_writable())?;
        let less = !crate::agent::conf::parse_names(&told).is_subset(&sample.wait_for);
        // Somebody else acknowledges under a name that they wait for.
        let stranger = sample.standbys.iter().any(|standby| {
            standby.streaming && !standby.is_genuine() && sample.wait_for.contains(&standby.node)
        });
        (less || stranger).then_some(told)
    }

    /// Says whether somebody has used the data, or made its commits wait for nobody, without being told to.
    pub fn set_touched(&self, touched: bool) {
        if self.shared.status().touched == touched {
            return;
        }
        if let Err(error) = self.remember(|durable| durable.touched = touched) {
            tracing::error!(error = format!("{error:#}"), touched, "not written down");
        }
        self.shared.change(|status| status.touched = touched);
    }

    /// Says whether the disk of the data, or of its WAL, is full. One that gives no answer hangs: it is asked no second time.
    async fn note_room(&self, asked: &mut Option<tokio::task::JoinHandle<bool>>) {
        let data = self.settings.data.clone();
        let look = move || {
            let full = |path: &std::path::Path| {
                let disk = nix::sys::statvfs::statvfs(path);
                // Some say that they have no blocks at all.
                disk.is_ok_and(|disk| {
                    disk.blocks() > 0 && disk.blocks_available() * disk.fragment_size() < ROOM
                })
            };
            full(&data) || full(&data.join("pg_wal"))
        };
        let answer = asked.get_or_insert_with(|| tokio::task::spawn_blocking(look));
        let Ok(full) = tokio::time::timeout(FOREIGN, answer).await else { return };
        *asked = None;
        let full = full.unwrap_or(false);
        if self.shared.status().full != full {
            self.shared.change(|status| status.full = full);
        }
    }

    /// Says whether what it acknowledges as a primary is on its own disk only. Before it is told to lead so; and after a standby
    /// was confirmed, or follows.
    ///
    /// # Errors
    /// When it cannot be made durable.
    pub fn set_alone(&self, alone: bool) -> anyhow::Result<()> {
        if self.shared.status().alone != alone {
            self.remember(|durable| durable.alone = alone)?;
            self.shared.change(|status| status.alone = alone);
        }
        Ok(())
    }

    /// Watches the data while it is nobody's: an operator may start Postgres beside its agent, and change the data.
    pub async fn guard(&self, shutdown: tokio_util::sync::CancellationToken) {
        let (mut reset, mut room) = (None, None);
        while tokio::time::timeout(FOREIGN, shutdown.cancelled()).await.is_err() {
            let settled = |status: &crate::protocol::NodeStatus| {
                matches!(status.postmaster, Postmaster::Stopped { settled: true, .. })
            };
            let before = self.shared.status();
            let wrong = self.waits_for_less(&before);
            if wrong.is_some() && wrong == reset {
                tracing::error!("somebody has changed what commits wait for");
                self.set_touched(true);
            }
            reset = wrong;
            self.note_room(&mut room).await;
            if !settled(&before) {
                continue;
            }
            let (life, foreign) = (self.shared.life(), self.note_foreign());
            // Read again as long as it runs, and once when it is gone.
            if foreign || before.foreign.is_some() {
                match self.control().await {
                    Ok(control) => self.shared.control(life, control),
                    Err(error) => tracing::warn!(error = format!("{error:#}"), "control file not read"),
                }
            }
        }
    }

    /// Accepts an order of this epoch and does `then` in the same step: none of another epoch comes in between.
    ///
    /// # Errors
    /// When it is of another orchestrator than the one obeyed, which nobody has displaced; when a higher epoch was accepted;
    /// when it cannot be made durable.
    pub fn accept<T>(&self, order: &Order, then: impl FnOnce() -> T) -> Result<T, Refusal> {
        let mut durable = self.durable.lock().unwrap_or_else(PoisonError::into_inner);
        let obeyed = &durable.orchestrator;
        if !obeyed.is_empty() && *obeyed != order.orchestrator && !order.displaces.contains(obeyed) {
            let message = format!(
                "this node obeys orchestrator {obeyed}, not {:?}: POST /adopt/{{region}} at the one that is to lead from now on",
                order.orchestrator
            );
            return Err(Refusal::new(Code::OtherOrchestrator, message));
        }
        if order.epoch < durable.epoch {
            let message = format!("epoch {} is over; {} holds", order.epoch, durable.epoch);
            return Err(Refusal::new(Code::OldEpoch, message));
        }
        if order.epoch > durable.epoch || *obeyed != order.orchestrator {
            let next =
                Durable { epoch: order.epoch, orchestrator: order.orchestrator.clone(), ..durable.clone() };
            self.save(&next)?;
            *durable = next;
            self.shared.change(|status| {
                status.epoch = order.epoch;
                status.orchestrator.clone_from(&order.orchestrator);
            });
        }
        Ok(then())
    }

    fn save(&self, durable: &Durable) -> anyhow::Result<()> {
        store::write(
            &self.settings.state,
            "agent.json",
            &serde_json::to_vec(durable).context("write agent.json")?,
        )
    }

    fn remember(&self, change: impl FnOnce(&mut Durable)) -> anyhow::Result<()> {
        let mut durable = self.durable.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = durable.clone();
        change(&mut next);
        self.save(&next)?;
        *durable = next;
        Ok(())
    }

    /// Says whether the data may have what the primary has not, see [`crate::protocol::NodeStatus::estranged`].
    ///
    /// # Errors
    /// When it cannot be made durable.
    pub fn set_estranged(&self, estranged: bool) -> anyhow::Result<()> {
        if self.shared.status().estranged != estranged {
            self.remember(|durable| durable.estranged = estranged)?;
            self.shared.change(|status| status.estranged = estranged);
        }
        Ok(())
    }

    /// The rebuild that began and has not ended well, if any.
    #[must_use]
    pub fn half_built(&self) -> Option<Rejoin> {
        self.durable.lock().unwrap_or_else(PoisonError::into_inner).rebuilding
    }

    #[must_use]
    pub fn conf(&self) -> &Conf {
        &self.conf
    }

    #[must_use]
    pub fn settings(&self) -> &RegionAgent {
        &self.settings
    }

    /// Writes the role; a running Postgres is told, unless it was told the same before. True when it was told now. Without
    /// `wait_for`, what commits wait for stays as it is.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn configure(
        &self,
        upstream: Option<&Upstream>,
        wait_for: Option<&BTreeSet<Node>>,
    ) -> anyhow::Result<bool> {
        let names = wait_for.map(names);
        let config_unconfirmed = self.config_unconfirmed.swap(false, Ordering::SeqCst);
        let changed =
            self.conf.write(upstream, names.as_deref()).inspect_err(|_| self.config_unconfirmed())?;
        self.shared.change(|status| status.upstream = upstream.cloned());
        let pid = *self.pid.lock().unwrap_or_else(PoisonError::into_inner);
        // Every process of Postgres reads the whole configuration again: not in the middle of a promotion for nothing.
        let tell = changed || config_unconfirmed;
        let told = tell && send(pid, Signal::SIGHUP);
        tracing::debug!(?upstream, names, told, "role written");
        // One that does not run reads it when it starts.
        if tell && !told && pid.is_some() {
            self.config_unconfirmed();
        }
        Ok(told)
    }

    /// Whether what Postgres was told last came through is not known: an order had not the effect that it should have. It
    /// reads nothing of a configuration in which somebody else made a mistake, for one.
    pub fn config_unconfirmed(&self) {
        self.config_unconfirmed.store(true, Ordering::SeqCst);
    }

    /// Starts the stopped node as a standby and returns; the first sample says when it answers. The caller has swept
    /// what an earlier postmaster left.
    ///
    /// # Errors
    /// When its data is half rebuilt, or it cannot be started.
    pub async fn start_as_standby(&self, control: Option<&Control>) -> Result<(), Refusal> {
        self.conf.mark_standby(true)?;
        self.start_as_it_is(control).await
    }

    /// The same in the role that its data has.
    ///
    /// # Errors
    /// As [`Postgres::start_as_standby`].
    pub async fn start_as_it_is(&self, control: Option<&Control>) -> Result<(), Refusal> {
        if let Some(how) = self.half_built() {
            let message = format!("a {how:?} of its data was interrupted; only a clone helps");
            return Err(Refusal::new(Code::HalfBuilt, message));
        }
        self.conf.free_timelines(control.map_or(0, |control| control.timeline))?;
        let path = self.settings.postgres_log.clone();
        let open = move || {
            let log = OpenOptions::new().create(true).append(true).open(&path);
            log.with_context(|| format!("open {}", path.display()))
        };
        // A disk that hangs holds nobody else up.
        let log = tokio::task::spawn_blocking(open).await.context("open Postgres' log")??;
        // An agent that is killed is a crash: Postgres ends at once, without waiting for anybody (children that do not end
        // are killed after 5 s). An orderly end of ours stops it before, in order.
        let mut command = self.command("postgres", "QUIT");
        command.arg("-D").arg(&self.settings.data);
        // A crashed backend ends the postmaster: what happens next is for the orchestrator to decide.
        command.args(["-c", "restart_after_crash=off"]);
        // We read what it says, whatever its administrator's language.
        command.args(["-c", "lc_messages=C"]);
        // What is this node's own must not be taken from a configuration that a rebuild copied from another.
        command.args(["-c", &format!("port={}", self.settings.port)]);
        command.args(["-c", &format!("cluster_name={}", self.settings.node)]);
        command.stdout(log.try_clone().context("open the log twice")?).stderr(log);
        let mut child = spawn(command).await.context("start the postmaster")?;
        let pid = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
        *self.pid.lock().unwrap_or_else(PoisonError::into_inner) = pid;
        self.shared.postmaster(Postmaster::Starting, None);
        let (shared, slot) = (self.shared.clone(), self.pid.clone());
        let tool = self.clone_for_tools();
        self.tasks.spawn(async move {
            let ended = tokio::select! {
                status = child.wait() => Some(outcome(status)),
                () = procs::dies(pid, &shared) => None,
            };
            let asked = shared.status().postmaster == Postmaster::Stopping;
            let (clean, exit) = ended.clone().map_or((false, None), |(clean, exit)| (clean, Some(exit)));
            if !asked {
                tracing::error!(
                    exit = exit.as_deref().unwrap_or("not known yet"),
                    "the postmaster ended unasked"
                );
            }
            // Said at once; what its control file holds follows when its last child is gone. Under the lock, so that
            // an order to stop that comes now cannot have the last word.
            {
                let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
                *slot = None;
                shared.postmaster(Postmaster::Stopped { exit, clean, settled: false }, None);
            }
            let life = shared.life();
            if ended.is_none() {
                let (clean, exit) = outcome(child.wait().await);
                tracing::info!(exit, "the postmaster is gone");
                shared.exit(life, exit, clean);
            }
            if let Err(error) = procs::sweep(&tool.settings.data).await {
                tracing::error!(error = format!("{error:#}"), "children of the postmaster stay");
            }
            let control = tool.settled_control().await;
            shared.control(life, control);
        });
        Ok(())
    }

    /// Asks the postmaster to stop and returns; false when there is none.
    pub fn halt(&self, how: Stop) -> bool {
        let signal = match how {
            Stop::Fast => Signal::SIGINT,
            Stop::Immediate => Signal::SIGQUIT,
        };
        let pid = self.pid.lock().unwrap_or_else(PoisonError::into_inner);
        if pid.is_some() {
            self.shared.postmaster(Postmaster::Stopping, None);
        }
        send(*pid, signal)
    }

    /// True when there was a postmaster to signal.
    pub fn signal(&self, signal: Signal) -> bool {
        send(*self.pid.lock().unwrap_or_else(PoisonError::into_inner), signal)
    }

    /// Until [`Postgres::rebuild`] is through the data is not to be started. A clone is made beside it, and marks it only when
    /// it takes its place.
    ///
    /// # Errors
    /// When it cannot be made durable.
    pub fn begin_rebuild(&self, how: Rejoin) -> anyhow::Result<()> {
        if how == Rejoin::Rewind {
            self.remember(|durable| durable.rebuilding = Some(how))?;
        }
        self.shared.postmaster(Postmaster::Rebuilding { how }, None);
        Ok(())
    }

    /// Rewrites the data of a stopped node from `upstream`, and its role: the next start is as a standby of it. Ends
    /// stopped, whatever was ordered meanwhile.
    ///
    /// # Errors
    /// When the tool fails. Unless it had begun to change something, the data is what it was and can be started.
    pub async fn rebuild(
        &self,
        how: Rejoin,
        upstream: &Upstream,
        names: &BTreeSet<Node>,
        limit: Duration,
    ) -> Result<(), Refusal> {
        let rewritten = async {
            match how {
                Rejoin::Follow => {}
                Rejoin::Rewind => {
                    let rewound = self.rewind(upstream, limit).await;
                    if rewound.as_ref().is_err_and(|failed| !failed.touched) {
                        self.remember(|durable| durable.rebuilding = None)?;
                    }
                    rewound.map_err(|failed| failed.refusal)?;
                }
                Rejoin::Clone => {
                    self.copy(upstream, limit).await?;
                    self.remember(|durable| durable.rebuilding = Some(how))?;
                    let conf = self.conf.clone();
                    tokio::task::spawn_blocking(move || conf.take_copy())
                        .await
                        .context("put the copy in place")??;
                }
            }
            // The tools bring the primary's own role along.
            self.configure(Some(upstream), Some(names))?;
            self.conf.mark_standby(true)?;
            self.remember(|durable| {
                (durable.rebuilding, durable.estranged, durable.touched) = (None, false, false);
                durable.alone = false;
            })?;
            self.shared.change(|status| {
                (status.estranged, status.touched, status.alone) = (false, false, false);
            });
            let conf = self.conf.clone();
            tokio::task::spawn_blocking(move || conf.drop_aside()).await.context("remove the old data")??;
            Ok::<_, Refusal>(())
        };
        let result = rewritten.await;
        let outcome = if result.is_ok() { "done" } else { "failed" };
        // A clone may be the first data this node has ever had: without its system id it could not be promoted.
        let control = self.clone_for_tools().settled_control().await;
        self.shared.postmaster(
            Postmaster::Stopped { exit: Some(format!("{how:?} {outcome}")), clean: false, settled: true },
            control,
        );
        result
    }

    /// What the control file of the stopped node says; none when there is no data. Notes the system id.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn control(&self) -> anyhow::Result<Option<Control>> {
        self.clone_for_tools().control().await
    }

    /// Runs it in a task of its own.
    pub fn in_background(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(work);
    }

    fn clone_for_tools(&self) -> Tools {
        Tools {
            settings: self.settings.clone(),
            conf: self.conf.clone(),
            shared: self.shared.clone(),
            half_built: self.half_built().is_some(),
        }
    }

    fn command(&self, program: &str, on_our_death: &str) -> Command {
        tools::command(&self.settings, program, on_our_death)
    }
}

/// Whether it was a success, and what it was.
fn outcome(status: std::io::Result<ExitStatus>) -> (bool, String) {
    match status {
        Ok(status) => (status.success(), status.to_string()),
        Err(error) => (false, error.to_string()),
    }
}

fn send(pid: Option<Pid>, signal: Signal) -> bool {
    let Some(pid) = pid else { return false };
    kill(pid, signal).map_err(|error| tracing::warn!(%pid, %signal, %error, "not signalled")).is_ok()
}

/// Why an order is not carried out.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    pub code: Code,
    pub message: String,
}

impl Refusal {
    #[must_use]
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl From<anyhow::Error> for Refusal {
    fn from(error: anyhow::Error) -> Self {
        Self::new(Code::Failed, format!("{error:#}"))
    }
}
