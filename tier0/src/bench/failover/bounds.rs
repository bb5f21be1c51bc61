//! What is promised, and what of it a run did not keep.

use super::{Line, Scenario, name};

/// Longest median write gap, beside the median that Postgres alone needs on the same machine in the same run.
fn gap(scenario: Scenario, floor: f64) -> Option<f64> {
    match scenario {
        Scenario::Planned => Some(3.3 * floor),
        Scenario::PostmasterKill => Some(1.7 * floor),
        Scenario::NodeKill => Some(2.2 * floor),
        // Silence has to last before it means something.
        Scenario::NodeFreeze => Some(floor + 0.8),
        Scenario::Floor | Scenario::RedisKill => None,
    }
}

/// The worst write gap is at most so many times the median of its scenario.
const SPREAD: f64 = 2.5;
/// Until both nodes hold everything again, in seconds: median and worst.
const REJOIN: (f64, f64) = (5.0, 10.0);
/// Longest time until Sentinel names another master, in seconds, in every round.
const REDIS: f64 = 5.0;
/// Each operation takes less, in seconds.
const TOTAL: f64 = 5.0;

/// One sentence for each promise that was not kept.
pub(super) fn broken(lines: &[Line]) -> Vec<String> {
    let mut broken = Vec::new();
    let floor = lines.iter().find(|line| line.scenario == Scenario::Floor).and_then(|line| line.median_gap_s);
    for line in lines {
        let name = name(line.scenario);
        if let (Some(bound), Some(median)) =
            (floor.and_then(|floor| gap(line.scenario, floor)), line.median_gap_s)
        {
            if median > bound {
                broken.push(format!(
                    "{name}: median write gap {median:.3} s, at most {bound:.3} s is promised beside this run's floor"
                ));
            }
            if let Some(worst) = line.worst_gap_s.filter(|worst| *worst > SPREAD * median) {
                broken.push(format!(
                    "{name}: worst write gap {worst:.3} s, at most {SPREAD} times the median of {median:.3} s is promised"
                ));
            }
        }
        let returns =
            matches!(line.scenario, Scenario::PostmasterKill | Scenario::NodeKill | Scenario::NodeFreeze);
        if let (true, Some(median), Some(worst)) = (returns, line.median_rejoin_s, line.worst_rejoin_s)
            && (median > REJOIN.0 || worst > REJOIN.1)
        {
            broken.push(format!(
                "{name}: rejoined in {median:.1} s (worst {worst:.1} s), at most {} s ({} s) is promised",
                REJOIN.0, REJOIN.1
            ));
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
        let round = Round {
            gap_s: Some(gap),
            total_s: Some(total),
            redis_s: Some(redis),
            rejoin_s: Some(5.0),
            ..Round::default()
        };
        Line::new(scenario, &[round.clone(), round], 0, 0)
    }

    #[test]
    fn each_promise_that_was_not_kept_is_one_sentence() {
        use Scenario::{Floor, NodeFreeze, NodeKill, Planned, PostmasterKill, RedisKill};
        let floor = || line(Floor, 0.2, 0.0, 0.0);
        for (scenario, bound) in
            [(Planned, 0.66), (PostmasterKill, 0.34), (NodeKill, 0.44), (NodeFreeze, 1.0)]
        {
            let kept = [floor(), line(scenario, bound - 0.001, 4.999, 5.0)];
            assert_eq!(broken(&kept), [""; 0], "{scenario:?}");
            let found = broken(&[floor(), line(scenario, bound + 0.001, 4.999, 5.0)]);
            assert!(found.len() == 1 && found[0].contains("median write gap"), "{found:?}");
            let alone = [line(scenario, 9.0, 4.999, 5.0)];
            assert_eq!(broken(&alone), [""; 0], "nothing to compare with");
        }
        assert_eq!(broken(&[line(Floor, 9.0, 0.0, 0.0)]), [""; 0], "the floor promises nothing");
        let worst = Line { worst_gap_s: Some(0.51), ..line(PostmasterKill, 0.2, 1.0, 1.0) };
        assert_eq!(
            broken(&[floor(), worst]),
            ["postmaster_kill: worst write gap 0.510 s, at most 2.5 times the median of 0.200 s is promised"]
        );
        let late = Line { worst_rejoin_s: Some(10.1), ..line(NodeKill, 0.2, 1.0, 1.0) };
        assert_eq!(
            broken(&[late]),
            ["node_kill: rejoined in 5.0 s (worst 10.1 s), at most 5 s (10 s) is promised"]
        );
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
