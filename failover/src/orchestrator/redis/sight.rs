//! What the Sentinels and the Redis instances say at one moment, and what follows from it. Pure.
//!
//! No single one is believed. The master's address is the one that more than half of the configured Sentinels name;
//! an instance is master when it says so itself. Redis follows a region only when both are true of its instance.

use std::collections::BTreeMap;

use failover_api::{Node, RedisReport};

use crate::orchestrator::report::address;
use crate::protocol::Upstream;

/// What an instance is, by its own `ROLE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    Master,
    /// `copying`: it takes over the master's data and has only a part of it.
    Replica {
        copying: bool,
    },
    /// Not a Redis that holds data.
    Other(String),
}

/// The answers of all; those that gave none say why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sight {
    /// Each configured Sentinel, and the master it names.
    pub sentinels: Vec<(Upstream, Result<Upstream, String>)>,
    pub instances: BTreeMap<Node, (Upstream, Result<Role, String>)>,
}

impl Role {
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Master => "master",
            Self::Replica { .. } => "replica",
            Self::Other(name) => name,
        }
    }
}

/// Whether so many of the configured Sentinels are a majority.
#[must_use]
pub fn is_majority(count: usize, configured: usize) -> bool {
    count * 2 > configured
}

impl Sight {
    /// How many Sentinels name this address.
    #[must_use]
    pub fn naming(&self, master: &Upstream) -> usize {
        self.named().filter(|named| *named == master).count()
    }

    fn named(&self) -> impl Iterator<Item = &Upstream> {
        self.sentinels.iter().filter_map(|(_, named)| named.as_ref().ok())
    }

    /// The master that most Sentinels name.
    #[must_use]
    pub fn agreed(&self) -> Option<&Upstream> {
        self.named().find(|named| is_majority(self.naming(named), self.sentinels.len()))
    }

    /// Whether the instance of `region` is master, by its own word and by most Sentinels'.
    #[must_use]
    pub fn follows(&self, region: &str) -> bool {
        self.instances.get(region).is_some_and(|(address, role)| {
            *role == Ok(Role::Master) && is_majority(self.naming(address), self.sentinels.len())
        })
    }

    /// Whether more than one instance says that it is master.
    #[must_use]
    pub fn has_two_masters(&self) -> bool {
        self.masters().count() > 1
    }

    /// The instances that say so.
    pub fn masters(&self) -> impl Iterator<Item = (&Node, &Upstream)> {
        let masters = self.instances.iter().filter(|(_, (_, role))| *role == Ok(Role::Master));
        masters.map(|(region, (address, _))| (region, address))
    }

    #[must_use]
    pub fn region(&self, master: &Upstream) -> Option<&Node> {
        self.instances.iter().find(|(_, (address, _))| address == master).map(|(region, _)| region)
    }

    /// `host:port`, and the region when it is one of ours.
    fn place(&self, master: &Upstream) -> String {
        match self.region(master) {
            Some(region) => format!("{} ({region})", address(master)),
            None => format!("{} (of no region)", address(master)),
        }
    }

    /// `2 of 3 Sentinels name it, 1 names HOST:PORT (REGION)`.
    #[must_use]
    pub fn votes(&self, target: &Upstream) -> String {
        let mut others: BTreeMap<String, usize> = BTreeMap::new();
        for (_, named) in &self.sentinels {
            match named {
                Ok(named) if named == target => {}
                Ok(named) => *others.entry(format!("names {}", self.place(named))).or_default() += 1,
                Err(_) => *others.entry("names none".into()).or_default() += 1,
            }
        }
        let mut text = format!("{} of {} Sentinels name it", self.naming(target), self.sentinels.len());
        for (what, count) in others {
            text.push_str(&format!(", {count} {what}"));
        }
        text
    }

    /// For `GET /status`, but for what only those know who know the primary.
    #[must_use]
    pub fn report(&self) -> RedisReport {
        let agreed = self.agreed();
        let named = |(sentinel, named): &(Upstream, Result<Upstream, String>)| match named {
            Ok(named) => format!("{} names {}", address(sentinel), self.place(named)),
            Err(error) => format!("{}: {error}", address(sentinel)),
        };
        let error = agreed.is_none().then(|| {
            let answers: Vec<String> = self.sentinels.iter().map(named).collect();
            format!("no majority of the Sentinels agrees on a master: {}", answers.join("; "))
        });
        let role = |role: &Result<Role, String>| match role {
            Ok(role) => role.name().to_owned(),
            Err(error) => format!("does not answer: {error}"),
        };
        RedisReport {
            configured: true,
            master: agreed.map(address),
            region: agreed.and_then(|master| self.region(master)).cloned(),
            sentinels: self.sentinels.len(),
            sentinels_agree: agreed.map_or(0, |master| self.naming(master)),
            instances: self.instances.iter().map(|(node, (_, found))| (node.clone(), role(found))).collect(),
            error,
            ..RedisReport::default()
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::orchestrator::redis) fn at(port: u16) -> Upstream {
        Upstream { host: "h".into(), port }
    }

    /// Sentinels that name the instance on a port, 0 for none; instances `region1` on port 1 and so on.
    pub(in crate::orchestrator::redis) fn sight(named: &[u16], roles: &[Result<Role, String>]) -> Sight {
        let sentinel = |(number, port): (usize, &u16)| {
            let named = if *port == 0 { Err("no answer".to_owned()) } else { Ok(at(*port)) };
            (at(100 + u16::try_from(number).unwrap()), named)
        };
        let instance = |(number, role): (u16, &Result<Role, String>)| {
            (format!("region{number}"), (at(number), role.clone()))
        };
        Sight {
            sentinels: named.iter().enumerate().map(sentinel).collect(),
            instances: (1..).zip(roles).map(instance).collect(),
        }
    }

    pub(in crate::orchestrator::redis) const REPLICA: Result<Role, String> =
        Ok(Role::Replica { copying: false });

    #[test]
    fn most_of_the_configured_sentinels_and_the_instance_itself_must_say_so() {
        let roles = [REPLICA, Ok(Role::Master)];
        for (named, follows) in [
            (&[2, 2, 2][..], true),
            (&[1, 2, 2], true),
            (&[0, 2, 2], true),
            (&[2, 0, 0], false),
            (&[2, 1, 9], false),
            (&[0, 0, 0], false),
            (&[2, 2, 0, 0], false),
            (&[2], true),
        ] {
            let sight = sight(named, &roles);
            assert_eq!(sight.follows("region2"), follows, "{named:?}");
            assert_eq!(sight.agreed(), follows.then(|| at(2)).as_ref(), "{named:?}");
        }
        assert!(!sight(&[2, 2, 2], &[Ok(Role::Master), REPLICA]).follows("region2"), "it says otherwise");
        assert!(!sight(&[2, 2, 2], &[REPLICA, Err("no answer".into())]).follows("region2"));
        assert!(!sight(&[2, 2, 2], &roles).follows("region3"), "there is none");
    }

    #[test]
    fn the_report_tells_what_most_say_and_why_it_is_not_known() {
        let report = sight(&[1, 2, 2], &[REPLICA, Ok(Role::Master)]).report();
        assert_eq!((report.master.as_deref(), report.region.as_deref()), (Some("h:2"), Some("region2")));
        assert_eq!((report.sentinels_agree, report.sentinels, report.error), (2, 3, None));
        assert_eq!(report.instances.get("region1").map(String::as_str), Some("replica"));
        let report = sight(&[1, 9, 0], &[REPLICA, Err("refused".into())]).report();
        assert_eq!((report.master, report.region, report.sentinels_agree), (None, None, 0));
        assert_eq!(
            report.error.unwrap(),
            "no majority of the Sentinels agrees on a master: h:100 names h:1 (region1); h:101 names h:9 (of no region); h:102: no answer"
        );
        assert_eq!(report.instances.get("region2").map(String::as_str), Some("does not answer: refused"));
    }
}
