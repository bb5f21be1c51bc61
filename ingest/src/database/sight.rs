//! Which node is the primary: watched all the time, through one session per node.
//!
//! A promotion is seen within milliseconds, without a login: sessions to a standby survive it. As soon as a node with a
//! higher timeline is seen, every connection to the others ends, so that a frozen old primary holds nobody up for as long
//! as a commit may take. A timeline below one already seen is never believed again. Nothing here cancels a statement.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus::IntCounter;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Config;
use tokio_util::sync::CancellationToken;

use super::connection::{Opened, open};
use super::handshake::{OpenError, role};
use crate::failure::WriteError;

/// How long the first primary seen has to wait for nodes that have not answered yet: one of them may be ahead.
const STRAGGLER_WAIT: Duration = Duration::from_millis(300);
/// How often every node is asked while one is the primary: what a frozen primary adds to a gap, at most.
const IDLE_POLL: Duration = Duration::from_millis(100);
/// While none is.
const SEARCH_POLL: Duration = Duration::from_millis(10);
/// Between two tries to open a session with a node.
const REOPEN: Duration = Duration::from_millis(50);

/// A node's last probe.
#[derive(Debug, Clone, PartialEq, Eq)]
enum NodeProbe {
    /// Not asked yet.
    None,
    /// Its timeline; nothing while it is in recovery.
    Role(Option<u32>),
    /// Why there is none.
    Failed(String),
}

/// What all nodes say, and what follows from it. Pure.
#[derive(Debug)]
struct Probes {
    highest: u32,
    probes: Vec<NodeProbe>,
}

impl Probes {
    /// The node to write to: writable, and not on an older timeline than one seen before.
    fn primary(&self) -> Option<(usize, u32)> {
        let leads = |(index, probe): (usize, &NodeProbe)| match probe {
            NodeProbe::Role(Some(timeline)) => Some((index, *timeline)),
            _ => None,
        };
        let best = self.probes.iter().enumerate().filter_map(leads).max_by_key(|(_, timeline)| *timeline)?;
        (best.1 >= self.highest).then_some(best)
    }

    fn is_settled(&self) -> bool {
        self.probes.iter().all(|probe| *probe != NodeProbe::None)
    }

    /// # Errors
    /// Why a node of this role is not written to.
    fn admit(&mut self, role: Option<u32>) -> Result<(), String> {
        let Some(timeline) = role else {
            return Err("no primary: the node that answered is in recovery".into());
        };
        if timeline < self.highest {
            return Err(format!(
                "an old primary answered: timeline {timeline}, but {} was seen",
                self.highest
            ));
        }
        self.highest = timeline;
        Ok(())
    }
}

/// One node.
#[derive(Debug)]
struct Node {
    config: Config,
    address: String,
    /// It takes no start-up options: a pooler is in between.
    bare: AtomicBool,
    /// Ends every connection to it. Replaced when it has been used.
    cut: Mutex<CancellationToken>,
    /// Sessions opened while it was a standby: after its promotion nobody has to log in first.
    spares: Mutex<Vec<Opened>>,
    /// It was seen as a standby: a spare may be missing.
    looked: Notify,
}

/// Watches until dropped.
#[derive(Debug)]
pub(super) struct Sight {
    nodes: Vec<Node>,
    probes: Mutex<Probes>,
    primary: watch::Sender<Option<usize>>,
    /// The pool's interface carries the driver's errors only.
    refused: Mutex<Option<String>>,
    /// Sessions that were opened and not used.
    pub(super) refusals: IntCounter,
    began: Instant,
    patience: Duration,
    spares: usize,
}

/// Ends the watching when dropped.
#[derive(Debug)]
pub(super) struct Watching {
    pub(super) sight: Arc<Sight>,
    _tasks: JoinSet<()>,
}

impl Watching {
    /// Begins to watch `nodes`, reached with `base`. `spares` are the sessions kept ready with each standby.
    pub(super) fn begin(
        base: &Config,
        nodes: Vec<(String, u16)>,
        patience: Duration,
        spares: usize,
        refusals: IntCounter,
    ) -> Self {
        let nodes: Vec<Node> = nodes
            .into_iter()
            .map(|(host, port)| {
                let mut config = base.clone();
                config.host(&host).port(port);
                Node {
                    config,
                    address: format!("{host}:{port}"),
                    bare: AtomicBool::new(false),
                    cut: Mutex::default(),
                    spares: Mutex::default(),
                    looked: Notify::new(),
                }
            })
            .collect();
        let probes = Probes { highest: 0, probes: vec![NodeProbe::None; nodes.len()] };
        let sight = Arc::new(Sight {
            probes: Mutex::new(probes),
            primary: watch::Sender::new(None),
            refused: Mutex::default(),
            refusals,
            began: Instant::now(),
            patience,
            // With one node there is nothing to cut over to.
            spares: if nodes.len() > 1 { spares } else { 0 },
            nodes,
        });
        let mut tasks = JoinSet::new();
        for index in 0..sight.nodes.len() {
            tasks.spawn(sight.clone().watch(index));
            // Apart: a host that accepts no further session must not keep the watcher from what the one it has would tell.
            tasks.spawn(sight.clone().keep_spares(index));
        }
        Self { sight, _tasks: tasks }
    }
}

impl Sight {
    /// Waits for a primary.
    ///
    /// # Errors
    /// With every node's last probe, when there is none within `limit`.
    pub(super) async fn wait(&self, limit: Duration) -> Result<(), String> {
        let mut primary = self.primary.subscribe();
        match timeout(limit, primary.wait_for(Option::is_some)).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(self.explain()),
        }
    }

    fn explain(&self) -> String {
        let probes = self.probes.lock().unwrap_or_else(PoisonError::into_inner);
        let each: Vec<String> = self
            .nodes
            .iter()
            .zip(&probes.probes)
            .map(|(node, probe)| match probe {
                NodeProbe::None => format!("{}: no answer yet", node.address),
                NodeProbe::Role(None) => format!("{}: in recovery", node.address),
                NodeProbe::Role(Some(timeline)) => {
                    format!("{}: timeline {timeline}, but {} was seen", node.address, probes.highest)
                }
                NodeProbe::Failed(reason) => format!("{}: {reason}", node.address),
            })
            .collect();
        format!("no primary ({})", each.join("; "))
    }

    /// A connection to the primary, one that is open already if there is any.
    ///
    /// # Errors
    /// When it cannot be opened, or is refused; `Ok(None)` when it is not within the time, or there is no primary.
    pub(super) async fn connect(&self) -> Result<Option<Opened>, OpenError> {
        let Some(node) = self.primary.borrow().and_then(|index| self.nodes.get(index)) else {
            return Ok(None);
        };
        let spare = loop {
            match node.spares.lock().unwrap_or_else(PoisonError::into_inner).pop() {
                Some((client, _)) if client.is_closed() => {}
                other => break other,
            }
        };
        let opened = match spare {
            Some(spare) => Ok(Some(spare)),
            None => timeout(self.patience, node.open()).await.ok().transpose(),
        };
        if let Err(error) = &opened {
            self.count(error);
        }
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = match &opened {
            Err(OpenError::Refused(reason)) => Some(format!("{}: {reason}", node.address)),
            _ => None,
        };
        opened
    }

    fn count(&self, error: &OpenError) {
        if matches!(error, OpenError::Refused(_)) {
            self.refusals.inc();
        }
    }

    /// Why the last session asked for was refused, if it was.
    pub(super) fn refusal(&self) -> Option<String> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// A session with one node, whatever it is.
    ///
    /// # Errors
    /// [`WriteError::Retry`] when there is none within the time.
    pub(super) async fn open(&self, number: usize) -> Result<tokio_postgres::Client, WriteError> {
        let Some(node) = self.nodes.get(number) else {
            return Err(WriteError::Retry(format!("there is no node {number}")));
        };
        // Its driver ends with the client.
        match timeout(self.patience, open(&node.config, &node.bare, CancellationToken::new())).await {
            Ok(Ok((client, _))) => Ok(client),
            Ok(Err(error)) => Err(WriteError::Retry(format!("{}: {error}", node.address))),
            Err(_) => Err(WriteError::Retry(format!("{}: no session in time", node.address))),
        }
    }

    /// Whether a node of this role may be written to; a higher timeline than before is remembered.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn admit(&self, role: Option<u32>) -> Result<(), String> {
        self.probes.lock().unwrap_or_else(PoisonError::into_inner).admit(role)
    }

    async fn watch(self: Arc<Self>, index: usize) {
        let Some(node) = self.nodes.get(index) else { return };
        loop {
            // Its own token: the watcher's session is not one of those that a cut-over ends. It ends with this turn, even when
            // the node owes an answer.
            let cut = CancellationToken::new();
            let _end = cut.clone().drop_guard();
            let reason = match timeout(self.patience, open(&node.config, &node.bare, cut)).await {
                Ok(Ok(opened)) => self.follow(index, node, opened).await,
                Ok(Err(error)) => {
                    self.count(&error);
                    error.to_string()
                }
                Err(_) => format!("no session within {:?}", self.patience),
            };
            self.note(index, NodeProbe::Failed(reason));
            sleep(REOPEN).await;
        }
    }

    /// Asks through one session until it fails; says why it did.
    async fn follow(&self, index: usize, node: &Node, (client, driver): Opened) -> String {
        let mut primary = self.primary.subscribe();
        let mut ended = driver;
        loop {
            let role = match timeout(self.patience, role(&client)).await {
                Ok(Ok(role)) => role,
                Ok(Err(error)) => return error.to_string(),
                Err(_) => return format!("no answer within {:?}", self.patience),
            };
            self.note(index, NodeProbe::Role(role));
            if role.is_none() {
                node.looked.notify_one();
            }
            let calm = primary.borrow_and_update().is_some();
            tokio::select! {
                _ = &mut ended => return "the session ended".into(),
                // The primary went or came: look at once.
                _ = primary.changed() => {}
                () = sleep(if calm { IDLE_POLL } else { SEARCH_POLL }) => {}
            }
        }
    }

    async fn keep_spares(self: Arc<Self>, index: usize) {
        let Some(node) = self.nodes.get(index) else { return };
        loop {
            node.looked.notified().await;
            self.keep_spare(node).await;
        }
    }

    /// Opens one session more, while there are too few and nobody is in need of a primary.
    async fn keep_spare(&self, node: &Node) {
        let missing = {
            let mut spares = node.spares.lock().unwrap_or_else(PoisonError::into_inner);
            spares.retain(|(client, _)| !client.is_closed());
            spares.len() < self.spares
        };
        if missing
            && self.primary.borrow().is_some()
            && let Ok(Ok(opened)) = timeout(self.patience, node.open()).await
        {
            node.spares.lock().unwrap_or_else(PoisonError::into_inner).push(opened);
        }
    }

    fn note(&self, index: usize, probe: NodeProbe) {
        let mut probes = self.probes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = probes.probes.get_mut(index) {
            *known = probe;
        }
        let found = probes.primary();
        if probes.highest == 0 && !probes.is_settled() && self.began.elapsed() < STRAGGLER_WAIT {
            return;
        }
        if let Some((leader, timeline)) = found {
            if timeline > probes.highest {
                tracing::info!(
                    primary = self.nodes.get(leader).map(|node| &node.address),
                    timeline,
                    "primary"
                );
            }
            probes.highest = timeline;
        }
        let found = found.map(|(leader, _)| leader);
        self.primary.send_if_modified(|known| {
            let before = std::mem::replace(known, found);
            if found.is_some() && before != found {
                let others = self.nodes.iter().enumerate().filter(|(other, _)| Some(*other) != found);
                others.for_each(|(_, node)| node.cut());
            }
            before != found
        });
    }
}

impl Node {
    async fn open(&self) -> Result<Opened, OpenError> {
        open(&self.config, &self.bare, self.token()).await
    }

    fn token(&self) -> CancellationToken {
        self.cut.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends every connection to this node.
    fn cut(&self) {
        let token = std::mem::take(&mut *self.cut.lock().unwrap_or_else(PoisonError::into_inner));
        token.cancel();
        self.spares.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn primary(highest: u32, probes: &[NodeProbe]) -> Option<usize> {
        Probes { highest, probes: probes.to_vec() }.primary().map(|(index, _)| index)
    }

    #[test]
    fn the_highest_timeline_wins_and_no_lower_one_is_believed_again() {
        use NodeProbe::{Failed, None as Unasked, Role};
        let failed = || Failed("gone".into());
        for (highest, probes, expected) in [
            (0, vec![Role(Some(1)), Role(None)], Some(0)),
            (0, vec![Role(Some(1)), Role(Some(2))], Some(1)),
            (1, vec![Role(None), Role(None)], None),
            (1, vec![failed(), Role(None)], None),
            (2, vec![Role(Some(1)), failed()], None),
            (2, vec![Role(Some(1)), Unasked], None),
            (2, vec![Role(Some(3)), Role(Some(2))], Some(0)),
        ] {
            assert_eq!(primary(highest, &probes), expected, "{highest} {probes:?}");
        }
    }

    #[test]
    fn an_old_primary_is_never_believed_again() {
        let mut probes = Probes { highest: 0, probes: Vec::new() };
        assert!(probes.admit(Some(1)).is_ok());
        assert!(probes.admit(None).unwrap_err().contains("recovery"));
        assert!(probes.admit(Some(3)).is_ok());
        assert!(probes.admit(Some(2)).unwrap_err().contains("timeline 2"));
        assert!(probes.admit(Some(3)).is_ok());
    }
}
