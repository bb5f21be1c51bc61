use proptest::prelude::*;

use super::*;

const HOUR: i64 = 3_600_000_000;
const SECOND: i64 = 1_000_000;
const LIMITS: Limits =
    Limits { retention_us: 24 * HOUR, tolerance_us: 300 * SECOND, max_offset_us: 10 * SECOND };
/// The true time when the monotonic clock is 0.
const TRUE: i64 = 1_800_000_000 * SECOND;

/// A machine: its clock and the primary's are off by so much.
struct World {
    beliefs: Beliefs,
    at: i64,
    own_off: i64,
    primary_off: i64,
}

impl World {
    fn new(own_off: i64, primary_off: i64) -> Self {
        let mut world = Self { beliefs: Beliefs::new(LIMITS), at: 0, own_off, primary_off };
        world.second();
        world
    }

    fn own(&self) -> i64 {
        TRUE + self.at + self.own_off
    }

    fn second(&mut self) {
        self.at += SECOND;
        let primary = TRUE + self.at + self.primary_off;
        self.beliefs.measured(primary, (self.at, self.at), self.own());
    }

    fn state(&self) -> State {
        self.beliefs.state(self.own(), self.at)
    }

    /// A reading this much before (or after) the true time.
    fn accepts(&self, off: i64) -> bool {
        let (low, high) = self.beliefs.window(self.own(), self.at);
        (low..=high).contains(&(TRUE + self.at + off))
    }

    fn live(&mut self, count: usize) {
        for _ in 0..count {
            self.beliefs.heard(TRUE + self.at, self.own(), self.at);
        }
    }
}

#[test]
fn clocks_that_agree_judge_by_the_primarys() {
    let world = World::new(3 * SECOND, 0);
    assert_eq!(world.state(), State::Agreed);
    assert_eq!(world.beliefs.now(world.own(), world.at), TRUE + world.at);
    assert!(world.accepts(-24 * HOUR) && !world.accepts(-24 * HOUR - 1));
    assert!(world.accepts(300 * SECOND) && !world.accepts(300 * SECOND + 1));
}

#[test]
fn before_the_primary_was_asked_the_own_clock_counts() {
    let beliefs = Beliefs::new(LIMITS);
    assert_eq!(beliefs.state(TRUE, 0), State::Unknown);
    assert_eq!(beliefs.window(TRUE, 0), (TRUE - 24 * HOUR, TRUE + 300 * SECOND));
}

#[test]
fn one_wrong_clock_refuses_no_live_reading_and_comes_right_by_itself() {
    for (own, primary) in [(30 * HOUR, 0), (-30 * HOUR, 0), (0, 30 * HOUR), (0, -30 * HOUR)] {
        // Wrong from the start, and wrong from one moment on.
        for mut world in [World::new(own, primary), World::new(0, 0)] {
            (world.own_off, world.primary_off) = (own, primary);
            // Before the next question already.
            assert!(world.accepts(0), "{own} {primary}");
            world.second();
            assert_eq!(world.state(), State::Apart);
            assert!(world.accepts(0) && world.accepts(-23 * HOUR));
            (world.own_off, world.primary_off) = (0, 0);
            world.second();
            world.live(20);
            assert_eq!(world.state(), State::Agreed, "{own} {primary}");
            assert!(!world.accepts(-25 * HOUR) && !world.accepts(HOUR));
        }
    }
}

#[test]
fn when_both_jump_readings_decide() {
    for off in [30 * HOUR, -30 * HOUR, 600 * SECOND] {
        let mut world = World::new(0, 0);
        (world.own_off, world.primary_off) = (off, off);
        assert!(world.accepts(0), "before the next question");
        world.second();
        assert_eq!(world.state(), State::Doubted);
        // Live readings are not of the clocks' time: the clocks are wrong.
        world.live(100);
        assert_eq!(world.state(), State::Doubted);
        assert!(world.accepts(0));
        // Put right.
        (world.own_off, world.primary_off) = (0, 0);
        world.second();
        assert!(world.accepts(0));
        world.live(20);
        assert_eq!(world.state(), State::Agreed);
    }
}

#[test]
fn a_machine_that_slept_is_believed_when_readings_agree() {
    let mut world = World::new(0, 0);
    // The monotonic clock stood still for 30 hours: both others jump, and they are right.
    let now = TRUE + world.at + 30 * HOUR;
    world.beliefs.measured(now, (world.at, world.at), now);
    assert!(world.beliefs.in_doubt());
    for _ in 0..20 {
        world.beliefs.heard(now, now, world.at);
    }
    assert_eq!(world.beliefs.state(now, world.at), State::Agreed);
    assert_eq!(world.beliefs.window(now, world.at).0, now - 24 * HOUR);
}

#[test]
fn clocks_that_were_wrong_before_the_start_are_known_by_what_is_stored() {
    // Ahead by 30 hours, the newest reading is ten minutes old; behind, the same.
    for off in [30 * HOUR, -30 * HOUR, -HOUR] {
        let mut world = World::new(off, off);
        let stored = TRUE + world.at - 600 * SECOND;
        world.beliefs.remember_stored(stored, world.own(), world.at);
        assert_eq!(world.state(), State::Doubted, "{off}");
        assert!(world.accepts(0), "{off}");
        world.live(100);
        assert!(world.accepts(0), "{off}");
    }
    let mut world = World::new(0, 0);
    world.beliefs.remember_stored(TRUE - 600 * SECOND, world.own(), world.at);
    assert_eq!(world.state(), State::Agreed, "ten minutes without a reading are nothing");
}

#[test]
fn a_slow_answer_is_no_wrong_clock() {
    let mut beliefs = Beliefs::new(LIMITS);
    // The answer took 40 s: it may be from any moment of them.
    beliefs.measured(TRUE, (0, 40 * SECOND), TRUE + 40 * SECOND);
    assert_eq!(beliefs.state(TRUE + 40 * SECOND, 40 * SECOND), State::Agreed);
}

proptest! {
    /// Whatever the clocks do, a reading of a time that one of them shows now is accepted.
    #[test]
    fn what_a_clock_shows_is_accepted(
        steps in prop::collection::vec((-100 * HOUR..100 * HOUR, -100 * HOUR..100 * HOUR, 0..30_usize), 1..20),
    ) {
        let mut world = World::new(0, 0);
        for (own, primary, live) in steps {
            (world.own_off, world.primary_off) = (own, primary);
            prop_assert!(world.accepts(own), "own {own}, before the question");
            world.second();
            prop_assert!(world.accepts(own), "own {own}");
            prop_assert!(world.accepts(primary), "primary {primary}");
            world.live(live);
            prop_assert!(world.accepts(own), "own {own}, after readings");
        }
    }
}
