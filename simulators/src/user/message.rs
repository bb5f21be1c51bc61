//! A step of somebody's life as a message: its JSON, and what the tables must say afterwards.

use serde::Serialize;

use super::life::{SITES, State, Step, User, World, of};
use super::trouble::Trouble;
use crate::seeds::{join, mix};

/// What a message says of one session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Update {
    pub session_id: String,
    pub user_id: String,
    pub connection_status: &'static str,
    pub region: &'static str,
    pub username: Option<String>,
    pub ip_address: Option<String>,
    pub at_us: i64,
    pub login_us: Option<i64>,
    pub logout: bool,
}

/// What must become of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Meaning {
    Updates { updates: Vec<Update>, report: bool },
    DeadLetter(&'static str),
}

/// Ready to be published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub payload: Vec<u8>,
    pub meaning: Meaning,
}

#[derive(Serialize)]
struct Event<'a> {
    user_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    session_id: Option<&'a str>,
    event: &'a str,
    connection_status: &'a str,
    region: &'a str,
    timestamp: String,
}

#[derive(Serialize)]
struct Report<'a> {
    message_id: String,
    timestamp_utc: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    site_id: Option<&'a str>,
    metrics: Load,
    active_users_list: Vec<Entry<'a>>,
    queue_metadata: Metadata,
}

#[derive(Serialize)]
struct Load {
    active_users: usize,
    active_connections: usize,
    server_cpu_pct: f64,
    server_memory_gb: f64,
    average_latency_ms: f64,
}

#[derive(Serialize)]
struct Entry<'a> {
    user_id: &'a str,
    username: Option<&'a str>,
    session_id: &'a str,
    login_time: Option<String>,
    ip_address: Option<&'a str>,
    region: &'a str,
    connection_status: &'a str,
}

#[derive(Serialize)]
struct Metadata {
    producer: &'static str,
    sequence: u64,
}

/// Turns steps into messages. Keeps when each user's present session began.
#[derive(Debug)]
pub struct Writer {
    seed: u64,
    logins_us: Vec<Option<i64>>,
    last_us: i64,
}

impl Writer {
    #[must_use]
    pub fn new(seed: u64, users: u32) -> Self {
        Self { seed, logins_us: vec![None; users as usize], last_us: 0 }
    }

    /// The message of message number `number`. No two messages share a time, so that the newest is always one.
    pub fn write(
        &mut self,
        world: &World,
        step: &Step,
        number: u64,
        now_us: i64,
        trouble: Trouble,
    ) -> Message {
        self.last_us = now_us.max(self.last_us + 1);
        let at_us = self.last_us;
        let (mut payload, meaning) = match step {
            Step::Report { site, users } => self.report(world, *site, users, number, at_us, trouble),
            Step::Login(user) => self.event(world, *user, "login", "active", at_us, trouble),
            Step::Action(user) => self.event(world, *user, "active", "active", at_us, trouble),
            Step::Idle(user) => self.event(world, *user, "idle", "idle", at_us, trouble),
            Step::Logout(user) => self.event(world, *user, "logout", "disconnected", at_us, trouble),
        };
        if trouble == Trouble::NotJson {
            payload.truncate(payload.len() / 2);
        }
        let meaning = match trouble.reason() {
            Some(reason) => Meaning::DeadLetter(reason),
            None => meaning,
        };
        Message { payload, meaning }
    }

    fn event(
        &mut self,
        world: &World,
        number: u32,
        event: &'static str,
        status: &'static str,
        at_us: i64,
        trouble: Trouble,
    ) -> (Vec<u8>, Meaning) {
        let login = event == "login";
        if let (true, Some(since)) = (login, self.logins_us.get_mut(number as usize)) {
            *since = Some(at_us);
        }
        let logins = world.users.get(number as usize).map_or(0, |user| user.logins);
        let update = Update {
            session_id: self.session_id(number, logins),
            user_id: user_id(number),
            connection_status: status,
            region: of(number).region,
            username: None,
            ip_address: None,
            at_us,
            login_us: login.then_some(at_us),
            logout: event == "logout",
        };
        let payload = json(&Event {
            user_id: &update.user_id,
            session_id: (trouble != Trouble::MissingField).then_some(update.session_id.as_str()),
            event: if trouble == Trouble::WrongType { "dance" } else { event },
            connection_status: status,
            region: update.region,
            timestamp: time(at_us, trouble),
        });
        (payload, Meaning::Updates { updates: vec![update], report: false })
    }

    fn report(
        &self,
        world: &World,
        site: usize,
        users: &[(u32, State)],
        number: u64,
        at_us: i64,
        trouble: Trouble,
    ) -> (Vec<u8>, Meaning) {
        let updates: Vec<Update> = users
            .iter()
            .filter_map(|(number, state)| world.users.get(*number as usize).map(|user| (user, *state)))
            .map(|(user, state)| self.entry(user, state, at_us))
            .collect();
        let entries = updates
            .iter()
            .map(|update| Entry {
                user_id: &update.user_id,
                username: update.username.as_deref(),
                session_id: &update.session_id,
                login_time: update.login_us.map(|us| time(us, Trouble::None)),
                ip_address: update.ip_address.as_deref(),
                region: update.region,
                connection_status: update.connection_status,
            })
            .collect();
        let online = updates.iter().filter(|update| update.connection_status != "disconnected").count();
        let noise = (join(mix(self.seed), number) % 1000) as f64 / 1000.0;
        let site_id = SITES.get(site).map(|site| site.site_id);
        let report = Report {
            message_id: format!("{:016x}", join(mix(self.seed), number)),
            timestamp_utc: time(at_us, if trouble == Trouble::WrongType { Trouble::None } else { trouble }),
            site_id: site_id.filter(|_| trouble != Trouble::MissingField),
            metrics: Load {
                active_users: online,
                active_connections: online + online / 3,
                server_cpu_pct: ((5.0 + online as f64 * 2.0 + noise * 10.0) * 10.0).round() / 10.0,
                server_memory_gb: ((6.0 + online as f64 / 10.0) * 10.0).round() / 10.0,
                average_latency_ms: ((20.0 + noise * 30.0) * 10.0).round() / 10.0,
            },
            active_users_list: entries,
            queue_metadata: Metadata { producer: "user-simulator", sequence: number },
        };
        let mut payload = json(&report);
        if trouble == Trouble::WrongType {
            // The list becomes an object: the whole report is of the wrong type.
            let text = String::from_utf8_lossy(&payload).replacen(
                "\"active_users_list\":[",
                "\"active_users_list\":7,\"x\":[",
                1,
            );
            payload = text.into_bytes();
        }
        (payload, Meaning::Updates { updates, report: true })
    }

    fn entry(&self, user: &User, state: State, at_us: i64) -> Update {
        let key = join(mix(self.seed), u64::from(user.number));
        Update {
            session_id: self.session_id(user.number, user.logins),
            user_id: user_id(user.number),
            connection_status: match state {
                State::Active | State::Quiet => "active",
                State::Idle => "idle",
                State::Vanished | State::Offline => "disconnected",
            },
            region: of(user.number).region,
            username: Some(format!("{}.{:04}", name(key), user.number)),
            ip_address: Some(format!("10.{}.{}.{}", key >> 8 & 255, key >> 16 & 255, key >> 24 & 255)),
            at_us,
            login_us: self.logins_us.get(user.number as usize).copied().flatten(),
            logout: false,
        }
    }

    /// Every other user's client makes uuids, the rest `SESS-..`.
    fn session_id(&self, number: u32, login: u32) -> String {
        let key = join(join(mix(self.seed), u64::from(number)), u64::from(login));
        let (high, low) = (key, mix(key));
        if number.is_multiple_of(2) {
            return format!("SESS-{high:016x}");
        }
        let (a, b, c) = (high >> 32, high >> 16 & 0xffff, high & 0xfff);
        format!("{a:08x}-{b:04x}-4{c:03x}-8{:03x}-{:012x}", low >> 48 & 0xfff, low & 0xffff_ffff_ffff)
    }
}

const NAMES: [&str; 8] = ["ann", "bao", "chidi", "dara", "elif", "farid", "grace", "hugo"];

fn name(key: u64) -> &'static str {
    let place = usize::try_from(key % NAMES.len() as u64).unwrap_or_default();
    NAMES.get(place).copied().unwrap_or_default()
}

fn user_id(number: u32) -> String {
    format!("user_{number:04}")
}

fn time(us: i64, trouble: Trouble) -> String {
    const DAYS_30_US: i64 = 30 * 86_400 * 1_000_000;
    let us = if trouble == Trouble::FarFuture { us + DAYS_30_US } else { us };
    jiff::Timestamp::from_microsecond(us).unwrap_or(jiff::Timestamp::UNIX_EPOCH).to_string()
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}
