//! What a person must know of Redis: facts, and what to do. Pure.
//!
//! The text of an alarm changes only when a fact does: it is logged when it appears and when it goes.

use std::time::Duration;

use failover_api::Node;

use super::sight::{Role, Sight, is_majority};
use crate::orchestrator::report::address;

/// How long Redis may be elsewhere than the primary: Sentinel takes a second or two, and a person need not know of it.
const ELSEWHERE: Duration = Duration::from_secs(5);
/// How long two may say that they are master: after each move Sentinel leaves the old one as it is for about 10 s.
const TWO_MASTERS: Duration = Duration::from_secs(30);

/// What the sight is compared with.
#[derive(Debug)]
pub(super) struct Facts<'a> {
    /// Region of the primary of record.
    pub(super) wanted: &'a Node,
    pub(super) paused: bool,
    /// Name of the master in the Sentinels.
    pub(super) master: &'a str,
    /// How long Redis has been elsewhere; `None` when it follows.
    pub(super) elsewhere: Option<Duration>,
    pub(super) two_masters: Option<Duration>,
    /// Why the last move failed.
    pub(super) failure: Option<&'a str>,
}

pub(super) fn alarms(sight: &Sight, facts: &Facts<'_>) -> Vec<String> {
    let elsewhere = facts.elsewhere.is_some_and(|time| time >= ELSEWHERE);
    let two_masters = if elsewhere { ELSEWHERE } else { TWO_MASTERS };
    let mut alarms = Vec::new();
    if elsewhere {
        alarms.push(is_elsewhere(sight, facts));
    }
    if facts.two_masters.is_some_and(|time| time >= two_masters) {
        let masters: Vec<String> =
            sight.masters().map(|(region, at)| format!("{} ({region})", address(at))).collect();
        alarms.push(format!(
            "Redis has two masters: {} both say so; what is written to the one that Sentinel makes a replica is lost. Move its \
             clients away, then redis-cli -p PORT REPLICAOF the other one",
            masters.join(" and ")
        ));
    }
    alarms
}

fn is_elsewhere(sight: &Sight, facts: &Facts<'_>) -> String {
    let wanted = facts.wanted;
    let Some((target, role)) = sight.instances.get(wanted) else {
        return format!(
            "Redis does not follow the primary to {wanted}: redis.instances has none there; add one, or nothing is moved"
        );
    };
    let own = match role {
        Ok(Role::Master) => "says master".to_owned(),
        Ok(Role::Replica { copying: false }) => "is a replica".to_owned(),
        Ok(Role::Replica { copying: true }) => "is a replica that has not all data yet".to_owned(),
        Ok(Role::Other(role)) => format!("says that it is a {role}"),
        Err(error) => format!("does not answer ({error})"),
    };
    let asked = sight.sentinels.iter().any(|(_, named)| named.is_ok());
    let todo = match role {
        Err(_) => "start it, or mend the way to it; it is moved when it answers".to_owned(),
        Ok(Role::Other(_)) => "correct redis.instances".to_owned(),
        Ok(Role::Master) if !is_majority(sight.naming(target), sight.sentinels.len()) => {
            "start or resume the Sentinels that do not name it; one that was stopped acts again after 30 s"
                .to_owned()
        }
        Ok(_) if !asked => {
            "start or resume the Sentinels; one that was stopped acts again after 30 s".to_owned()
        }
        Ok(_) if facts.paused => format!(
            "nothing is moved while paused: POST /mode to resume, or SENTINEL FAILOVER {} at a Sentinel",
            facts.master
        ),
        Ok(Role::Replica { copying: true }) => "it is moved when it has all".to_owned(),
        Ok(_) => match facts.failure {
            Some(failure) => format!("the Sentinels are asked again; last: {failure}"),
            None => "the Sentinels are asked to move it".to_owned(),
        },
    };
    format!(
        "Redis does not follow the primary to {wanted}: {} {own}, {}: {todo}",
        address(target),
        sight.votes(target)
    )
}

#[cfg(test)]
mod tests {
    use super::super::sight::tests::{REPLICA, sight};
    use super::*;

    const LONG: Option<Duration> = Some(Duration::from_secs(60));

    fn say(
        named: &[u16],
        roles: &[Result<Role, String>],
        change: impl FnOnce(&mut Facts<'_>),
    ) -> Vec<String> {
        let (sight, wanted) = (sight(named, roles), "region2".to_owned());
        let mut facts = Facts {
            wanted: &wanted,
            paused: false,
            master: "tier0",
            elsewhere: (!sight.follows(&wanted)).then_some(Duration::from_secs(60)),
            two_masters: None,
            failure: None,
        };
        change(&mut facts);
        alarms(&sight, &facts)
    }

    #[test]
    fn says_what_is_and_what_to_do() {
        let master = || Ok(Role::Master);
        let none = |_: &mut Facts<'_>| {};
        assert!(say(&[1, 2, 2], &[REPLICA, master()], none).is_empty());
        assert_eq!(
            say(&[1, 1, 0], &[master(), REPLICA], none),
            [
                "Redis does not follow the primary to region2: h:2 is a replica, 0 of 3 Sentinels name it, 2 names h:1 (region1), \
              1 names none: the Sentinels are asked to move it"
            ]
        );
        for (named, roles, part) in [
            (&[2, 0, 9][..], [REPLICA, master()], "h:2 says master, 1 of 3 Sentinels name it, "),
            (&[2, 0, 0], [REPLICA, master()], "start or resume the Sentinels that do not name it"),
            (
                &[0, 0, 0],
                [master(), REPLICA],
                "0 of 3 Sentinels name it, 3 names none: start or resume the Sentinels",
            ),
            (&[1, 1, 1], [master(), Err("refused".into())], "h:2 does not answer (refused), "),
            (&[1, 1, 1], [master(), Ok(Role::Replica { copying: true })], "it is moved when it has all"),
            (&[2, 2, 2], [master(), REPLICA], "h:2 is a replica, 3 of 3 Sentinels name it: "),
            (&[2, 2, 2], [master(), Ok(Role::Other("sentinel".into()))], "correct redis.instances"),
        ] {
            let found = say(named, &roles, none);
            assert!(matches!(found.as_slice(), [alarm] if alarm.contains(part)), "{part}: {found:?}");
        }
        let found = say(&[1, 1, 1], &[master(), REPLICA], |facts| facts.paused = true);
        assert!(found.concat().contains("paused: POST /mode"), "{found:?}");
        let found = say(&[1, 1, 1], &[master(), REPLICA], |facts| facts.failure = Some("NOGOODSLAVE"));
        assert!(found.concat().ends_with("asked again; last: NOGOODSLAVE"), "{found:?}");
        assert!(say(&[1, 1, 1], &[master()], none).concat().contains("redis.instances has none there"));
    }

    #[test]
    fn both_masters_are_named_and_a_moment_is_no_alarm() {
        let roles = [Ok(Role::Master), Ok(Role::Master)];
        assert!(
            say(&[2, 2, 2], &roles, |facts| facts.two_masters = Some(Duration::from_secs(29))).is_empty()
        );
        let found = say(&[2, 2, 2], &roles, |facts| facts.two_masters = LONG);
        assert!(
            matches!(found.as_slice(), [alarm] if alarm.starts_with("Redis has two masters: h:1 (region1) and h:2 (region2) both say so")),
            "{found:?}"
        );
        let found = say(&[1, 1, 2], &roles, |facts| facts.two_masters = Some(Duration::from_secs(6)));
        assert_eq!(found.len(), 2, "{found:?}");
        let found = say(&[1, 1, 1], &[Ok(Role::Master), REPLICA], |facts| {
            facts.elsewhere = Some(Duration::from_secs(4));
        });
        assert!(found.is_empty(), "{found:?}");
    }
}
