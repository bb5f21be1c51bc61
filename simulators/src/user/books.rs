//! The ledger as it grows: what the broker has confirmed, folded to the newest state of each session.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use wire::sessions::{SessionLedger, SessionState};

use super::message::{Meaning, Message, Update};

/// Confirmed messages, folded.
#[derive(Debug, Clone, Default)]
pub struct Books {
    pub confirmed: u64,
    pub repeated: u64,
    pub site_reports: u64,
    pub dead_letters: BTreeMap<&'static str, u64>,
    /// The state, and the newest logout, which the state shows only while it is disconnected.
    sessions: BTreeMap<String, (SessionState, Option<i64>)>,
}

impl Books {
    /// The broker has confirmed this message; `repeat` when an equal one was published before.
    pub fn confirm(&mut self, message: &Message, repeat: bool) {
        self.confirmed += 1;
        self.repeated += u64::from(repeat);
        match &message.meaning {
            Meaning::DeadLetter(reason) => *self.dead_letters.entry(reason).or_default() += 1,
            Meaning::Updates { updates, report } => {
                self.site_reports += u64::from(*report && !repeat);
                updates.iter().for_each(|update| self.update(update));
            }
        }
    }

    fn update(&mut self, update: &Update) {
        let (state, logout_us) = self.sessions.entry(update.session_id.clone()).or_insert_with(|| {
            let state = SessionState {
                user_id: update.user_id.clone(),
                connection_status: String::new(),
                region: Some(update.region.into()),
                username: None,
                ip_address: None,
                login_us: None,
                logout_us: None,
                last_activity_us: i64::MIN,
            };
            (state, None)
        });
        // No two messages share a time.
        if update.at_us > state.last_activity_us {
            state.last_activity_us = update.at_us;
            state.connection_status = update.connection_status.into();
        }
        if update.username.is_some() {
            state.username.clone_from(&update.username);
            state.ip_address.clone_from(&update.ip_address);
        }
        state.login_us = state.login_us.max(update.login_us);
        if update.logout {
            *logout_us = (*logout_us).max(Some(update.at_us));
        }
        state.logout_us = logout_us.filter(|_| state.connection_status == "disconnected");
    }

    /// As a document. `unconfirmed` are messages sent without an answer.
    #[must_use]
    pub fn ledger<'m>(
        &self,
        (seed, complete): (u64, bool),
        (started_us, ended_us): (i64, i64),
        unconfirmed: impl Iterator<Item = &'m Message>,
    ) -> SessionLedger {
        let unknown: BTreeSet<&str> = unconfirmed
            .flat_map(|message| match &message.meaning {
                Meaning::Updates { updates, .. } => updates.as_slice(),
                Meaning::DeadLetter(_) => &[],
            })
            .map(|update| update.session_id.as_str())
            .collect();
        SessionLedger {
            seed,
            complete,
            started_us,
            ended_us,
            confirmed: self.confirmed,
            repeated: self.repeated,
            sessions: self.sessions.iter().map(|(id, (state, _))| (id.clone(), state.clone())).collect(),
            site_reports: self.site_reports,
            dead_letters: self.dead_letters.iter().map(|(reason, n)| ((*reason).into(), *n)).collect(),
            unknown: unknown.into_iter().map(str::to_owned).collect(),
        }
    }
}

/// The end of a run in numbers: `--summary`.
#[derive(Debug, Serialize)]
pub struct Summary {
    pub users: u32,
    pub seed: u64,
    pub seconds: f64,
    pub confirmed: u64,
    pub rate_per_s: f64,
    pub repeated: u64,
    pub resent: u64,
    pub skipped: u64,
    pub unconfirmed: u64,
    pub sessions: usize,
    pub site_reports: u64,
    pub dead_letters: BTreeMap<String, u64>,
}
