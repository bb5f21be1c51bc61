//! What is promised, and what of it a run did not keep.

use super::{Line, Scenario, name};

/// Longest median write gap, in seconds.
fn gap(scenario: Scenario) -> Option<f64> {
    match scenario {
        Scenario::Planned => Some(1.0),
        Scenario::PostmasterKill => Some(0.25),
        Scenario::NodeKill => Some(0.5),
        Scenario::NodeFreeze => Some(1.5),
        Scenario::Floor | Scenario::RedisKill => None,
    }
}

/// Longest time until Sentinel names another master, in seconds, in every round.
const REDIS: f64 = 5.0;
/// Each operation takes less, in seconds.
const TOTAL: f64 = 5.0;

/// One sentence for each promise that was not kept.
pub(super) fn broken(lines: &[Line]) -> Vec<String> {
    let mut broken = Vec::new();
    for line in lines {
        let name = name(line.scenario);
        if let (Some(bound), Some(median)) = (gap(line.scenario), line.median_gap_s)
            && median > bound
        {
            broken.push(format!("{name}: median write gap {median:.3} s, at most {bound} s is promised"));
        }
        if let Some(worst) = line.worst_total_s.filter(|worst| *worst >= TOTAL) {
            broken.push(format!("{name}: an operation took {worst:.3} s, less than {TOTAL} s is promised"));
        }
        if let Some(worst) = line.worst_redis_s.filter(|worst| *worst > REDIS) {
            broken.push(format!("{name}: Redis took {worst:.3} s, at most {REDIS} s is promised"));
        }
        if line.lost > 0 {
            broken.push(format!("{name}: {} readings LOST", line.lost));
        }
        if line.duplicated > 0 {
            broken.push(format!("{name}: {} readings stored twice", line.duplicated));
        }
    }
    broken
}

#[cfg(test)]
mod tests {
    use super::super::scenario::Round;
    use super::*;

    fn line(scenario: Scenario, gap: f64, total: f64, redis: f64) -> Line {
        let round =
            Round { gap_s: Some(gap), total_s: Some(total), redis_s: Some(redis), ..Round::default() };
        Line::new(scenario, &[round.clone(), round], 0, 0)
    }

    #[test]
    fn each_promise_that_was_not_kept_is_one_sentence() {
        use Scenario::{Floor, NodeFreeze, NodeKill, Planned, PostmasterKill, RedisKill};
        for (scenario, bound) in [(Planned, 1.0), (PostmasterKill, 0.25), (NodeKill, 0.5), (NodeFreeze, 1.5)]
        {
            assert_eq!(broken(&[line(scenario, bound, 4.999, 5.0)]), [""; 0], "{scenario:?}");
            let found = broken(&[line(scenario, bound + 0.001, 4.999, 5.0)]);
            assert!(found.len() == 1 && found[0].contains("median write gap"), "{found:?}");
        }
        assert_eq!(broken(&[line(Floor, 9.0, 0.0, 0.0)]), [""; 0], "the floor promises nothing");
        let found = broken(&[line(Planned, 0.1, 5.0, 0.0), line(RedisKill, 0.0, 0.0, 5.1)]);
        assert_eq!(
            found,
            [
                "planned: an operation took 5.000 s, less than 5 s is promised",
                "redis_kill: Redis took 5.100 s, at most 5 s is promised"
            ]
        );
        let found = broken(&[Line { lost: 1, duplicated: 2, ..line(Floor, 0.0, 0.0, 0.0) }]);
        assert_eq!(found, ["floor: 1 readings LOST", "floor: 2 readings stored twice"]);
    }
}
