//! How users live: they come by the hour of their region, act, go quiet (idle after five minutes), come back, log out
//! or vanish. A pure function of the seed: the same seed gives the same lives, step by step.
//!
//! Lives run on a clock of their own, in life seconds, that moves from step to step; at the default of 1,000 users and
//! 100 messages/s it runs about as fast as the wall clock. No wall clock here.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::seeds::{join, mix, unit};

/// A web site, the region its users live in and that region's distance from UTC in hours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Site {
    pub site_id: &'static str,
    pub region: &'static str,
    pub utc_offset: i64,
}

const fn site(site_id: &'static str, region: &'static str, utc_offset: i64) -> Site {
    Site { site_id, region, utc_offset }
}

pub const SITES: [Site; 10] = [
    site("SFO-WEB-01", "NA-WEST", -8),
    site("SEA-WEB-01", "NA-WEST", -8),
    site("DFW-WEB-01", "NA-CENTRAL", -6),
    site("ORD-WEB-01", "NA-CENTRAL", -6),
    site("NYC-WEB-01", "NA-EAST", -5),
    site("GRU-WEB-01", "SA-EAST", -3),
    site("LHR-WEB-01", "EU-WEST", 0),
    site("FRA-WEB-01", "EU-CENTRAL", 1),
    site("SIN-WEB-01", "AP-SOUTHEAST", 8),
    site("NRT-WEB-01", "AP-NORTHEAST", 9),
];

/// The hour (UTC) at which lives begin: it is day in half of the world.
const FIRST_HOUR: f64 = 15.0;
/// Life seconds without an action until a session is idle.
pub const IDLE_AFTER: f64 = 300.0;
const BETWEEN_REPORTS: f64 = 10.0;
/// Users one report lists.
const LISTED: usize = 20;

/// Where a user stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Offline,
    Active,
    /// Active, and will be idle at the next step.
    Quiet,
    Idle,
    /// Gone without a word; the next report says so.
    Vanished,
}

/// One user.
#[derive(Debug, Clone)]
pub struct User {
    pub number: u32,
    pub state: State,
    /// Sessions so far; the number of the present one.
    pub logins: u32,
    steps: u64,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Login(u32),
    Action(u32),
    Idle(u32),
    Logout(u32),
    /// A site's report, and the users it lists, with whether each is active, idle or gone.
    Report {
        site: usize,
        users: Vec<(u32, State)>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Actor {
    User(u32),
    Site(usize),
}

/// All users and what they do next.
#[derive(Debug)]
pub struct World {
    seed: u64,
    pub users: Vec<User>,
    /// By time (milliseconds of life), then actor, so that ties have one order.
    agenda: BinaryHeap<Reverse<(u64, Actor)>>,
    /// Where the next report of each site begins to list.
    cursor: [usize; SITES.len()],
}

impl World {
    /// Everybody is spread over the states as on a day that has long begun.
    #[must_use]
    pub fn new(seed: u64, users: u32) -> Self {
        let mut world = Self {
            seed,
            users: (0..users)
                .map(|number| User { number, state: State::Offline, logins: 0, steps: 0 })
                .collect(),
            agenda: BinaryHeap::new(),
            cursor: [0; SITES.len()],
        };
        for number in 0..users {
            // Most log in soon after the start, so that the site fills within half a minute.
            let spread = if world.draw(number, 0) < 0.8 { 30.0 } else { 1200.0 };
            let first = world.draw(number, 1) * spread;
            world.plan(0.0, first, Actor::User(number));
        }
        for site in 0..SITES.len() {
            world.plan(0.0, BETWEEN_REPORTS * (1.0 + site as f64 / 10.0), Actor::Site(site));
        }
        world
    }

    /// What happens next.
    pub fn step(&mut self) -> Step {
        loop {
            let Some(Reverse((at, actor))) = self.agenda.pop() else {
                // Every actor plans its next step, so the agenda is never empty; a report of nobody is harmless.
                return Step::Report { site: 0, users: Vec::new() };
            };
            let now = at as f64 / 1000.0;
            match actor {
                Actor::Site(site) => {
                    self.plan(now, BETWEEN_REPORTS, actor);
                    return self.report(site);
                }
                Actor::User(number) => {
                    if let Some(step) = self.live(number, now) {
                        return step;
                    }
                }
            }
        }
    }

    fn plan(&mut self, now: f64, after: f64, actor: Actor) {
        self.agenda.push(Reverse((((now + after) * 1000.0).max(0.0) as u64, actor)));
    }

    /// Even over 0..1, by user, step and purpose.
    fn draw(&self, number: u32, purpose: u64) -> f64 {
        let steps = self.users.get(number as usize).map_or(0, |user| user.steps);
        f64::from(unit(join(join(mix(self.seed), u64::from(number)), steps * 8 + purpose)))
    }

    fn live(&mut self, number: u32, now: f64) -> Option<Step> {
        let (chance, long) = (self.draw(number, 2), -(1.0 - self.draw(number, 3)).ln());
        let state = self.users.get(number as usize).map(|user| user.state)?;
        let (state, after, step) = match state {
            State::Offline => (State::Active, 5.0 * long, Some(Step::Login(number))),
            State::Active if chance < 0.006 => {
                (State::Offline, away(number, now) * long, Some(Step::Logout(number)))
            }
            State::Active if chance < 0.008 => (State::Vanished, 60.0, None),
            State::Active if chance < 0.02 => (State::Quiet, IDLE_AFTER, Some(Step::Action(number))),
            State::Active => (State::Active, 8.0 * long, Some(Step::Action(number))),
            State::Quiet => (State::Idle, 200.0 * long, Some(Step::Idle(number))),
            State::Idle if chance < 0.7 => (State::Active, 8.0 * long, Some(Step::Action(number))),
            State::Idle if chance < 0.9 => {
                (State::Offline, away(number, now) * long, Some(Step::Logout(number)))
            }
            State::Idle => (State::Vanished, 60.0, None),
            State::Vanished => (State::Offline, away(number, now) * long, None),
        };
        let user = self.users.get_mut(number as usize)?;
        user.state = state;
        user.steps += 1;
        if matches!(step, Some(Step::Login(_))) {
            user.logins += 1;
        }
        self.plan(now, after, Actor::User(number));
        step
    }

    /// Lists some of the site's users that have a session, the others next time.
    fn report(&mut self, site: usize) -> Step {
        let count = self.users.len().saturating_sub(site).div_ceil(SITES.len());
        let start = self.cursor.get(site).copied().unwrap_or(0);
        let mut users = Vec::new();
        let mut seen = 0;
        while seen < count && users.len() < LISTED {
            let place = site + (start + seen) % count * SITES.len();
            seen += 1;
            if let Some(user) = self.users.get(place).filter(|user| user.state != State::Offline) {
                users.push((user.number, user.state));
            }
        }
        if let Some(cursor) = self.cursor.get_mut(site) {
            *cursor = (start + seen) % count.max(1);
        }
        Step::Report { site, users }
    }
}

/// Mean life seconds until a user comes back: long at night.
fn away(number: u32, now: f64) -> f64 {
    let offset = of(number).utc_offset as f64;
    let hour = (FIRST_HOUR + offset + now / 3600.0).rem_euclid(24.0);
    // Busiest at 14, quietest at 2.
    let busy = 0.55 + 0.45 * ((hour - 14.0) / 24.0 * std::f64::consts::TAU).cos();
    60.0 / busy
}

/// The site a user belongs to.
#[must_use]
pub fn of(number: u32) -> Site {
    SITES.get(number as usize % SITES.len()).copied().unwrap_or(SITES[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_lives_the_same_life() {
        let steps = |seed| {
            let mut world = World::new(seed, 50);
            (0..2000).map(|_| world.step()).collect::<Vec<_>>()
        };
        assert_eq!(steps(7), steps(7));
        assert_ne!(steps(7), steps(8));
    }

    #[test]
    fn every_life_makes_sense_and_all_kinds_of_steps_happen() {
        let mut world = World::new(1, 200);
        let mut states = [State::Offline; 200];
        let mut counts = [0; 5];
        for _ in 0..200_000 {
            match world.step() {
                Step::Login(n) => {
                    assert!(matches!(
                        states[n as usize],
                        State::Offline | State::Vanished | State::Active | State::Idle
                    ));
                    states[n as usize] = State::Active;
                    counts[0] += 1;
                }
                Step::Action(n) => {
                    assert!(matches!(states[n as usize], State::Active | State::Idle));
                    states[n as usize] = State::Active;
                    counts[1] += 1;
                }
                Step::Idle(n) => {
                    assert_eq!(states[n as usize], State::Active);
                    states[n as usize] = State::Idle;
                    counts[2] += 1;
                }
                Step::Logout(n) => {
                    assert!(matches!(states[n as usize], State::Active | State::Idle));
                    states[n as usize] = State::Offline;
                    counts[3] += 1;
                }
                Step::Report { site, users } => {
                    assert!(users.len() <= LISTED);
                    assert!(users.iter().all(|(n, _)| *n as usize % SITES.len() == site));
                    counts[4] += 1;
                }
            }
        }
        assert!(counts.iter().all(|count| *count > 200), "{counts:?}");
    }
}
