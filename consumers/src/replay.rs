//! The command `mqtt-consumer --replay-dead-letters`: what it may be told, what it says.

use anyhow::Context;
use clap::Args;
use ingest::database::Database;
use ingest::dead_letter::Reason;
use ingest::replay::{Filter, Replay, Report};
use ingest::settings::{DatabaseSettings, IngestSettings};
use service::health::Health;
use service::process::Process;

#[derive(Debug, Clone, Args)]
pub struct ReplayArgs {
    /// Decode dead letters again with the current settings: store what is valid now, delete its dead letters,
    /// and exit. No broker connection is made, and consumers may run meanwhile
    #[arg(long, conflicts_with = "leave")]
    pub replay_dead_letters: bool,
    /// Only dead letters with this reason, for example `timestamp_out_of_range`
    #[arg(long, requires = "replay_dead_letters", value_parser = reason)]
    reason: Option<Reason>,
    /// Only dead letters received since this time, such as 2026-02-03T04:05:06Z, or in this period, such as
    /// `2h` or `3d`
    #[arg(long, requires = "replay_dead_letters", value_parser = since)]
    since: Option<jiff::Timestamp>,
    /// Do everything except the commit, and print what the result would be
    #[arg(long, requires = "replay_dead_letters")]
    dry_run: bool,
    /// Print the result as one line of JSON
    #[arg(long, requires = "replay_dead_letters")]
    json: bool,
}

fn reason(text: &str) -> Result<Reason, String> {
    Reason::ALL.into_iter().find(|reason| reason.as_str() == text).ok_or_else(|| {
        let all: Vec<&str> = Reason::ALL.iter().map(|reason| reason.as_str()).collect();
        format!("is none of {}", all.join(", "))
    })
}

fn since(text: &str) -> Result<jiff::Timestamp, String> {
    if let Ok(time) = text.parse() {
        return Ok(time);
    }
    let ago = humantime_serde::re::humantime::parse_duration(text)
        .map_err(|_| "is neither a time such as 2026-02-03T04:05:06Z nor a duration such as 2h".to_owned())?;
    jiff::Timestamp::now().checked_sub(ago).map_err(|error| error.to_string())
}

/// Starts the replay as a task of the process, which ends with it.
///
/// # Errors
/// When the settings name no node.
pub fn start(
    args: ReplayArgs,
    database: &DatabaseSettings,
    ingest: &IngestSettings,
    health: &Health,
    process: &mut Process,
) -> anyhow::Result<()> {
    let replay = Replay {
        database: Database::new(database, 1, health.dependency("postgres"))?,
        settings: ingest.clone(),
        filter: Filter { reason: args.reason, since: args.since },
        dry_run: args.dry_run,
    };
    let shutdown = process.shutdown();
    process.start("replay", async move {
        let report =
            replay.run(&shutdown, |report| tracing::info!("{}", sentence(report, args.dry_run))).await?;
        say(&report, &args)?;
        shutdown.cancel();
        Ok(())
    });
    Ok(())
}

#[allow(clippy::print_stdout, reason = "the command's outcome")]
fn say(report: &Report, args: &ReplayArgs) -> anyhow::Result<()> {
    if args.json {
        println!("{}", serde_json::to_string(report).context("the outcome as JSON")?);
    } else {
        println!("{}", sentence(report, args.dry_run));
    }
    Ok(())
}

fn sentence(report: &Report, dry_run: bool) -> String {
    let Report { letters, replayed, rows, duplicates, refused, cut } = report;
    let would = if dry_run { "dry run, nothing is changed: " } else { "" };
    format!(
        "{would}{letters} dead letters looked at: {replayed} replayed and deleted ({rows} new rows, {duplicates} readings stored \
         already), {refused} still refused, {cut} not replayable because their payload was cut"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_and_times_are_understood_or_refused_in_words() {
        assert_eq!(reason("not_json"), Ok(Reason::NotJson));
        assert!(reason("not json").unwrap_err().contains("timestamp_out_of_range"));
        assert_eq!(since("2026-02-03T04:05:06Z").unwrap().as_second(), 1_770_091_506);
        let three_days_ago = jiff::Timestamp::now().as_second() - 3 * 86_400;
        assert!((since("3d").unwrap().as_second() - three_days_ago).abs() < 10);
        let two_hours_ago = jiff::Timestamp::now().as_second() - 7200;
        assert!((since("2h").unwrap().as_second() - two_hours_ago).abs() < 10);
        assert!(since("yesterday").unwrap_err().contains("such as 2h"));
    }
}
