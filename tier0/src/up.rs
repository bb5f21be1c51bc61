//! `tier0 up`: start, watch, drain, verify, stop.
//!
//! Each phase is a file: [`stack`] starts and stops, [`sample`] measures, [`screen`] and [`plain`] show, [`finish`]
//! drains and verifies, [`summary`] says what came of it.

pub mod args;
mod finish;
mod interrupt;
mod leftovers;
mod plain;
pub mod regions;
pub mod sample;
mod screen;
mod sessions;
mod stack;
mod started;
mod summary;
mod watching;

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ingest::settings::IngestSettings;
use serde::{Deserialize, Serialize};
use service::settings::{self, Settings, SettingsArgs};

use crate::home::{Home, Lock, Run, State};
use crate::terminal::say;
use crate::up::args::UpArgs;
use crate::verify::stored;
pub(crate) use finish::load_file as load_ledger;
use interrupt::Interrupts;
use playground::postgres::Role;
use playground::process::Process;
use playground::shipped;
use sample::{Sample, Sampler};
use screen::Screen;
pub(crate) use sessions::load as load_session_ledger;
use stack::Stack;

/// Exit status of a command that was interrupted.
const ABORTED: u8 = 130;
const TICK: Duration = Duration::from_secs(1);
/// How often the start looks for the first committed row.
const FIRST_ROW: Duration = Duration::from_millis(20);

/// Why the live phase ended.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    /// The time given by `--for` is over.
    Time,
    /// The simulator has sent all it had to send.
    Finished,
    /// Ctrl-C, SIGTERM or `q`.
    Asked,
    /// A process ended that should not have.
    Died(String),
}

/// Runs it all. The exit status is the verdict.
///
/// # Errors
/// When something does not start or cannot be checked.
pub async fn run(home: &Home, args: UpArgs) -> anyhow::Result<ExitCode> {
    let began = Instant::now();
    let Some(lock) = home.lock()? else {
        bail!("tier0 is already up here (tier0 status shows it, tier0 down ends it)");
    };
    let mut interrupts = Interrupts::listen()?;
    // Without processes it says that we are starting.
    home.write_state(&State { up: Some(me()), processes: Vec::new() })?;
    let outcome = owning(home, &args, &lock, &mut interrupts, began).await;
    also(outcome, home.write_state(&State::default()))
}

/// From the start to the stop of everything; what is left is the state to be cleared.
async fn owning(
    home: &Home,
    args: &UpArgs,
    lock: &Lock,
    interrupts: &mut Interrupts,
    began: Instant,
) -> anyhow::Result<ExitCode> {
    if args.fresh {
        home.clear(lock)?;
    }
    if home.is_elsewhere() {
        say(format!(
            "the data is in {}: the servers' users cannot reach this directory",
            home.data().display()
        ));
    }
    let mut stack = tokio::select! {
        stack = Stack::start(home.data(), args) => stack?,
        () = interrupts.at_least(1) => return Ok(aborted()),
    };
    home.write_state(&state(&mut stack))?;
    let mut watched = interrupts.clone();
    let result = tokio::select! {
        result = session(home, args, &mut stack, &mut watched, began) => result,
        () = interrupts.at_least(2) => Ok(aborted()),
    };
    if matches!(&result, Ok(code) if *code == ExitCode::from(ABORTED)) {
        return result;
    }
    match interruptible(stack.stop(), interrupts).await {
        Some(stopped) => also(result, stopped.and_then(|()| home.delete_old(lock))),
        None => Ok(aborted()),
    }
}

/// Stopping what runs. `None` when it was interrupted: what still ran is killed.
async fn interruptible(
    stop: impl Future<Output = anyhow::Result<()>>,
    interrupts: &mut Interrupts,
) -> Option<anyhow::Result<()>> {
    let mut first = interrupts.clone();
    let asked_before = first.count() > 0;
    let say_how = async {
        first.at_least(1).await;
        if !asked_before {
            say("stopping (Ctrl-C again ends it at once)");
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        stopped = stop => Some(stopped),
        () = interrupts.at_least(2) => None,
        () = say_how => None,
    }
}

/// The outcome of the run; a failure of what came after it is told, and never hides the run's own.
fn also(outcome: anyhow::Result<ExitCode>, after: anyhow::Result<()>) -> anyhow::Result<ExitCode> {
    match (outcome, after) {
        (outcome, Ok(())) => outcome,
        (Ok(code), Err(error)) if code == ExitCode::SUCCESS => Err(error),
        (outcome, Err(error)) => {
            say(format!("and the end failed too: {error:#}"));
            outcome
        }
    }
}

fn aborted() -> ExitCode {
    say("aborted: everything is killed; what the broker had not written to disk is lost");
    ExitCode::from(ABORTED)
}

/// From the first message to the verdict.
async fn session(
    home: &Home,
    args: &UpArgs,
    stack: &mut Stack,
    interrupts: &mut Interrupts,
    began: Instant,
) -> anyhow::Result<ExitCode> {
    leftovers::take(stack).await?;
    let first_transaction = stored::next_transaction(&*stack.cluster.connect(Role::Owner).await?).await?;
    home.write_run(Run { first_transaction, retention: Some(retention()?) })?;
    let before = stack.consumer_metrics().await;
    let started = Instant::now();
    stack.start_simulator(home, args).await?;
    stack.start_sessions(home, args)?;
    stack.start_watching(home, args)?;
    home.write_state(&state(stack))?;
    let mut sampler = Sampler::new(started, began, before);
    let end = live(home, args, stack, interrupts, &mut sampler).await?;
    stack.notices.drain(..).for_each(say);
    match &end {
        End::Time => say("the time is over: draining"),
        End::Finished => say("everything is sent: draining"),
        End::Asked => say("draining (Ctrl-C again aborts)"),
        End::Died(what) => say(format!("FAILED: {what}")),
    }
    let summary = finish::finish(home, args, stack, &mut sampler, started).await;
    let summary = match (summary, &end) {
        (Ok(summary), _) => summary,
        // What died is the cause; that the rest could not be checked follows from it.
        (Err(error), End::Died(_)) => {
            say(format!("cannot check what is stored: {error:#}"));
            return Ok(ExitCode::FAILURE);
        }
        (Err(error), _) => return Err(error),
    };
    say(&summary);
    if let Some(path) = &args.summary {
        let text = serde_json::to_string_pretty(&summary).context("write the summary")?;
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    }
    let good = summary.holds && !matches!(end, End::Died(_));
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Shows what happens until something ends it.
async fn live(
    home: &Home,
    args: &UpArgs,
    stack: &mut Stack,
    interrupts: &mut Interrupts,
    sampler: &mut Sampler,
) -> anyhow::Result<End> {
    let full_screen = !args.no_ui && std::io::stdout().is_terminal() && std::io::stdin().is_terminal();
    if full_screen {
        wait_first_row(stack, interrupts, sampler).await;
    }
    let mut screen = if full_screen { Some(Screen::open(interrupts.clone())?) } else { None };
    let deadline = args.duration.map(|duration| sampler.started() + duration);
    let mut first_row = tokio::time::interval(FIRST_ROW);
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + TICK, TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let over = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = interrupts.at_least(1) => return Ok(End::Asked),
            () = over => return Ok(End::Time),
            _ = first_row.tick(), if sampler.start_seconds().is_none() && stack.consumer.is_some() => {
                look_for_first_row(stack, sampler).await;
            }
            _ = ticks.tick() => {
                if let Some(lines) = stack.progress()? {
                    home.write_state(&state(stack))?;
                    if screen.is_none() {
                        lines.into_iter().for_each(say);
                    }
                }
                if stack.finished() {
                    return Ok(End::Finished);
                }
                if let Some(what) = stack.died() {
                    return Ok(End::Died(what));
                }
                let notices = stack.tend().await?;
                if !notices.is_empty() {
                    home.write_state(&state(stack))?;
                }
                let sample = sampler.take(stack).await;
                // The screen covers what is said: it shows that itself, and it is said again when the screen is gone.
                for notice in notices.into_iter().chain(sampler.events()) {
                    if screen.is_some() {
                        stack.note(format!("{:>5.0} s  {notice}", sample.seconds));
                    } else {
                        say(notice);
                    }
                }
                show(&mut screen, sampler, &sample, stack)?;
            }
        }
    }
}

fn show(
    screen: &mut Option<Screen>,
    sampler: &Sampler,
    sample: &Sample,
    stack: &Stack,
) -> anyhow::Result<()> {
    match screen {
        Some(screen) => screen.draw(sampler, sample, stack),
        None => {
            say(plain::line(sample));
            Ok(())
        }
    }
}

async fn look_for_first_row(stack: &Stack, sampler: &mut Sampler) {
    if let Some(metrics) = stack.consumer_metrics().await
        && sampler.saw_rows(&metrics)
    {
        say(format!(
            "first row committed {:.2} s after the start",
            sampler.start_seconds().unwrap_or_default()
        ));
    }
}

/// Before the screen covers it: the start's last line.
async fn wait_first_row(stack: &Stack, interrupts: &mut Interrupts, sampler: &mut Sampler) {
    let limit = Instant::now() + Duration::from_secs(2);
    while sampler.start_seconds().is_none() && stack.consumer.is_some() && Instant::now() < limit {
        tokio::select! {
            () = interrupts.at_least(1) => return,
            () = tokio::time::sleep(FIRST_ROW) => look_for_first_row(stack, sampler).await,
        }
    }
}

/// How long the consumer will keep readings: its settings, read as it reads them.
fn retention() -> anyhow::Result<Duration> {
    let config = shipped::config_path("tier0.toml").ok();
    let args = SettingsArgs { config, ..SettingsArgs::default() };
    let settings: TableSettings = settings::load(&args, std::env::vars().collect())?;
    Ok(settings.ingest.retention)
}

/// What of the settings says how the tables are kept.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct TableSettings {
    ingest: IngestSettings,
}

impl Settings for TableSettings {
    const SECTIONS: &'static [&'static str] = &["ingest"];

    fn check(&self) -> Result<(), String> {
        self.ingest.check()
    }
}

fn me() -> Process {
    let pid = i32::try_from(std::process::id()).unwrap_or_default();
    Process::new("tier0 up", pid, 0, std::path::Path::new(""))
}

fn state(stack: &mut Stack) -> State {
    State { up: Some(me()), processes: stack.processes() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runs_own_failure_is_not_hidden_by_a_later_one() {
        let later = || Err(anyhow::anyhow!("later"));
        let text = |outcome: anyhow::Result<ExitCode>| outcome.map_err(|error| error.to_string());
        assert_eq!(text(also(Err(anyhow::anyhow!("first")), later())), Err("first".into()));
        assert_eq!(text(also(Ok(ExitCode::SUCCESS), later())), Err("later".into()));
        assert_eq!(text(also(Ok(ExitCode::FAILURE), later())), Ok(ExitCode::FAILURE));
        assert_eq!(text(also(Ok(ExitCode::SUCCESS), Ok(()))), Ok(ExitCode::SUCCESS));
    }

    #[tokio::test]
    async fn a_stop_that_hangs_ends_at_the_second_interrupt() {
        let mut interrupts = Interrupts::listen().unwrap();
        let counter = interrupts.clone();
        assert!(interruptible(async { Ok(()) }, &mut interrupts).await.is_some());
        // The first one is for draining, or for asking politely.
        counter.count_one();
        assert!(interruptible(async { Ok(()) }, &mut interrupts).await.is_some());
        counter.count_one();
        assert!(interruptible(std::future::pending(), &mut interrupts).await.is_none());
    }
}
