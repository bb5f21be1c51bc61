//! The end of a run: nothing more is sent, everything accepted is stored, every device is checked on every node.

use std::time::{Duration, Instant};

use anyhow::Context;
use wire::ledger::Ledger;

use super::sample::Sampler;
use super::stack::Stack;
use super::started::{CONSUMER_GRACE, SIMULATOR_GRACE};
use super::summary::Summary;
use crate::home::{Home, Run};
use crate::terminal::say;
use crate::up::args::UpArgs;
use crate::verify::stored::{Scope, Stored, read};
use crate::verify::{Report, compare};
use playground::metrics::Metrics;
use playground::postgres::Role;

const POLL: Duration = Duration::from_millis(50);
/// Nothing in flight and nothing new for this long: what has not come will not come.
const QUIET: Duration = Duration::from_secs(10);
/// Something in flight and no progress for this long: the consumer is stuck.
const STUCK: Duration = Duration::from_secs(60);
const REPLAY: Duration = Duration::from_secs(120);
/// A scan of some hundred million rows.
const VERIFY: Duration = Duration::from_secs(900);

pub(super) async fn finish(
    home: &Home,
    args: &UpArgs,
    stack: &mut Stack,
    sampler: &mut Sampler,
    started: Instant,
) -> anyhow::Result<Summary> {
    sampler.take(stack).await;
    let mut trouble = Vec::new();
    if let Some(simulator) = &mut stack.simulator
        && let Err(error) = simulator.terminate(SIMULATOR_GRACE).await
    {
        trouble.push(format!("{error:#}"));
    }
    let published = started.elapsed();
    let ledger = if stack.simulator.is_some() { Some(load(home)?) } else { None };
    if stack.consumer.is_some() {
        let wanted =
            ledger.as_ref().map(|ledger| ledger.readings() + ledger.dead_letters.values().sum::<u64>());
        if let Some(what) = drain(stack, sampler, wanted).await {
            trouble.push(what);
        }
        sampler.take(stack).await;
    }
    if let Some(consumer) = &mut stack.consumer
        && let Err(error) = consumer.terminate(CONSUMER_GRACE).await
    {
        trouble.push(format!("{error:#}"));
    }
    let stored_after = started.elapsed();
    let sessions = match &mut stack.sessions {
        Some(sessions) => match sessions.finish(&stack.cluster).await {
            Ok(ledger) => ledger,
            Err(error) => {
                trouble.push(format!("{error:#}"));
                None
            }
        },
        None => None,
    };
    stack.settle(REPLAY).await?;
    let run = home.run()?;
    let retention = run.and_then(|run| run.retention);
    let scope = match run {
        Some(Run { first_transaction, .. }) if stack.kept => Scope::Run { first_transaction },
        _ => Scope::Everything,
    };
    let began = Instant::now();
    let nodes = tokio::time::timeout(VERIFY, look(stack, ledger.as_ref(), scope, retention))
        .await
        .with_context(|| format!("the tables were not read within {VERIFY:?}"))??;
    let sessions_found = match &sessions {
        Some(ledger) => super::sessions::look(&stack.cluster, ledger).await?,
        None => Vec::new(),
    };
    if ledger.is_none() {
        let wrong = sessions_found.iter().filter(|node| !node.holds());
        trouble.extend(wrong.map(|node| format!("{}: {}", node.node, node.verdict())));
    }
    say(format!("every device checked on every node in {:.2} s", began.elapsed().as_secs_f64()));
    let report = ledger.as_ref().map(|ledger| {
        let findings = nodes.iter().map(|(name, stored)| compare(name, ledger, stored)).collect();
        Report::new(ledger, findings).with_sessions(sessions_found)
    });
    Ok(Summary::new(
        args,
        ledger.as_ref(),
        (report, sessions.as_ref()),
        &nodes,
        sampler,
        (published, stored_after),
        trouble,
    ))
}

/// The ledger of a run that was asked to end.
pub(crate) fn load(home: &Home) -> anyhow::Result<Ledger> {
    load_file(&home.ledger())
}

pub(crate) fn load_file(path: &std::path::Path) -> anyhow::Result<Ledger> {
    let file = std::fs::File::open(path).with_context(|| format!("open the ledger {}", path.display()))?;
    serde_json::from_reader(std::io::BufReader::new(file))
        .with_context(|| format!("read the ledger {}", path.display()))
}

/// What each node has stored, all nodes at the same time.
async fn look(
    stack: &Stack,
    ledger: Option<&Ledger>,
    scope: Scope,
    retention: Option<Duration>,
) -> anyhow::Result<Vec<(String, Stored)>> {
    let retention = retention.filter(|_| ledger.is_some());
    let empty = Ledger::default();
    let (ledger, scope) = match ledger {
        Some(ledger) => (ledger, scope),
        None => (&empty, Scope::Everything),
    };
    let looks = stack.cluster.nodes.iter().map(|node| async {
        let mut db = node.connect(Role::Owner).await?;
        let stored =
            read(&mut db, ledger, scope).await.with_context(|| format!("look into {}", node.name()))?;
        anyhow::Ok((node.name().to_owned(), stored.within(retention)))
    });
    futures_util::future::try_join_all(looks).await
}

/// Waits until the consumer has settled `wanted` messages, or has nothing to do; says what is wrong otherwise.
async fn drain(stack: &mut Stack, sampler: &mut Sampler, wanted: Option<u64>) -> Option<String> {
    let mut progress = Instant::now();
    let mut last = None;
    loop {
        // The simulator was asked to end and is no longer looked at.
        if let Some(what) = stack.died() {
            return Some(what);
        }
        let metrics = sampler.scrape(stack).await;
        let settled = settled(sampler, &metrics);
        let received = sampler.since_start(&metrics, "ingest_received_total");
        let waiting = metrics.count("ingest_rows_in_flight") + metrics.count("ingest_queue_messages");
        if last != Some((received, settled, waiting)) {
            last = Some((received, settled, waiting));
            progress = Instant::now();
        }
        if waiting == 0 && wanted.is_some_and(|wanted| settled >= wanted) {
            return None;
        }
        let quiet = progress.elapsed();
        if waiting == 0 && quiet > QUIET {
            return wanted.filter(|wanted| settled < *wanted).map(|wanted| {
                format!(
                    "the consumer settled {settled} of {wanted} readings and gets no more from the broker"
                )
            });
        }
        if quiet > STUCK {
            return Some(format!(
                "the consumer is stuck: {waiting} readings in flight and no progress for {STUCK:?}"
            ));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Readings that are rows or dead letters by now. Duplicates do not count: their first copy did.
fn settled(sampler: &Sampler, metrics: &Metrics) -> u64 {
    sampler.since_start(metrics, "ingest_rows_committed_total")
        + sampler.since_start(metrics, "ingest_dead_letters_total")
}
