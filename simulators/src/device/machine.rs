//! How a machine behaves: load with inertia, heat that follows the load, wear, faults that develop and are repaired.
//!
//! A pure function of (seed, device, sequence): no state is kept, so a reading can be made again for a retry, and
//! two runs with one seed agree. A machine's time is its sequence; one step is one reading, five seconds by default.

use wire::fleet::Device;

use crate::seeds::{join, mix, wave};

mod kinds;

pub use kinds::METRICS;

/// What a machine measured: its metrics in the order of `wire::fleet`, as integers scaled by the decimals of
/// [`METRICS`] (unused places are 0), and what it says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    pub values: [i32; 8],
    pub status: Status,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// `OK`, `WARN` or `CRITICAL`.
    pub state: &'static str,
    pub code: &'static str,
    pub message: &'static str,
}

/// One kind of metric: decimals shown, and the limits a healthy or a failing machine stays within.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    pub decimals: u8,
    pub low: f32,
    pub high: f32,
}

/// The three faults a kind of machine knows, each as seen when it gives warning and when it is critical.
struct Fault {
    warning: Status,
    critical: Status,
}

/// From this severity on a fault gives warning, from that on it is critical.
const WARNING: f32 = 0.45;
const CRITICAL: f32 = 0.8;

/// A machine has at most one fault per epoch of 2^12 readings, 5.7 hours of a five-second cycle.
const EPOCH_OCTAVE: u32 = 12;
/// Of 256 epochs this many have a fault: every machine fails about once in 28 hours, and around one in sixty is
/// in a visible state at any time.
const FAULTY_OF_256: u64 = 51;
/// Readings from the service that ends wear to the next.
const SERVICE_OCTAVE: u32 = 17;

/// What the formulas of the kinds work with. All parts of one moment of one machine.
#[derive(Debug, Clone, Copy)]
struct Moment {
    /// 0.1..=1.0 of what the machine can do, now.
    load: f32,
    /// The load of the last minutes: what temperatures follow.
    warm: f32,
    /// 0..1 since the last service.
    wear: f32,
    /// Severity 0..=1 of each of the kind's three faults; at most one is above 0.
    faults: [f32; 3],
    /// A slow wave of the machine's own, -1..=1, for what does not follow the load.
    slow: f32,
    /// Measurement noise -1..=1 per metric.
    noise: [f32; 8],
}

/// The machine with this number measures for the `sequence`th time.
#[must_use]
pub fn sample(seed: u64, device: &Device, sequence: u64) -> Sample {
    let key = join(seed, u64::from(device.number));
    // Machines are not born together: each starts at an age of its own within a service interval.
    let age = (mix(key) >> (64 - SERVICE_OCTAVE)) + sequence;
    let site = join(seed, device.site.lat.to_bits());
    let demand = |sequence: u64, age: u64| {
        // A site runs its machines together, so the slowest part is the site's.
        0.62 + 0.20 * wave(site, sequence, 10) + 0.14 * wave(key, age, 8)
    };
    // The first readings look back before the machine's first sequence; both times start far enough from 0.
    let (sequence, age) = (sequence + 64, age + 64);
    let (fault, severity) = fault(key, age);
    let mut faults = [0.0; 3];
    if let Some(slot) = faults.get_mut(fault) {
        *slot = severity;
    }
    let moment = Moment {
        load: (demand(sequence, age) + 0.04 * wave(mix(key ^ 1), age, 4)).clamp(0.1, 1.0),
        warm: (0.5 * demand(sequence - 12, age - 12) + 0.5 * demand(sequence - 40, age - 40)).clamp(0.1, 1.0),
        wear: wear(age),
        faults,
        slow: wave(mix(key ^ 2), age, 11),
        noise: noise(join(key, age)),
    };
    let (values, known) = kinds::measure(device, &moment);
    let status = match known.get(fault) {
        Some(fault) if severity >= CRITICAL => fault.critical,
        Some(fault) if severity >= WARNING => fault.warning,
        _ => kinds::nominal(device),
    };
    Sample { values, status }
}

/// Which of the kind's faults the machine has, and how bad it is: develops slowly at first and then ever faster,
/// stays critical until somebody comes, heals quickly.
#[allow(clippy::cast_precision_loss, reason = "all are below 2^12")]
fn fault(key: u64, age: u64) -> (usize, f32) {
    let drawn = join(key ^ 0xfa17, age >> EPOCH_OCTAVE);
    if drawn & 0xff >= FAULTY_OF_256 {
        return (0, 0.0);
    }
    let kind = usize::from((drawn >> 8) as u16 % 3);
    let onset = drawn >> 24 & 0x3ff;
    let develops = 300 + (drawn >> 34 & 0x3ff);
    let stays = 20 + (drawn >> 44 & 0x3f);
    let heals = 24;
    let Some(x) = (age & ((1 << EPOCH_OCTAVE) - 1)).checked_sub(onset) else { return (kind, 0.0) };
    let severity = if x < develops {
        let part = x as f32 / develops as f32;
        part * part
    } else if x < develops + stays {
        1.0
    } else {
        1.0 - ((x - develops - stays) as f32 / heals as f32).min(1.0)
    };
    (kind, severity)
}

#[allow(clippy::cast_precision_loss, reason = "the age within a service interval is below 2^24")]
fn wear(age: u64) -> f32 {
    (age & ((1 << SERVICE_OCTAVE) - 1)) as f32 / (1_u64 << SERVICE_OCTAVE) as f32
}

fn noise(bits: u64) -> [f32; 8] {
    bits.to_le_bytes().map(|byte| (f32::from(byte) - 127.5) / 127.5)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    /// Readings of six hours at five seconds.
    const HOURS_6: u64 = 4320;

    fn value(sample: &Sample, device: &Device, name: &str) -> f32 {
        let at = device.device_type.metrics.iter().position(|metric| *metric == name).unwrap();
        let kind = METRICS[device.number as usize % 4][at];
        sample.values[at] as f32 / 10_f32.powi(i32::from(kind.decimals))
    }

    #[test]
    fn the_same_seed_gives_the_same_values_and_another_seed_others() {
        for number in [0, 1, 2, 3, 4567, 99_999] {
            let device = Device::new(number);
            assert_eq!(sample(1, &device, 700), sample(1, &device, 700));
            assert_ne!(sample(1, &device, 700).values, sample(2, &device, 700).values);
            assert_ne!(sample(1, &device, 700).values, sample(1, &device, 701).values);
        }
    }

    #[test]
    fn over_hours_every_metric_stays_within_its_limits_and_is_not_clamped_to_them() {
        for number in 0..400 {
            let device = Device::new(number);
            for sequence in (0..HOURS_6).step_by(7) {
                let sample = sample(3, &device, sequence);
                for (at, name) in device.device_type.metrics.iter().enumerate() {
                    let limits = METRICS[number as usize % 4][at];
                    let value = value(&sample, &device, name);
                    assert!(
                        value > limits.low && value < limits.high,
                        "{} {name} = {value} at {sequence}",
                        device.device_id()
                    );
                }
                let used = device.device_type.metrics.len();
                assert!(sample.values[used..].iter().all(|unused| *unused == 0));
            }
        }
    }

    #[test]
    fn values_have_inertia() {
        let turbine = Device::new(8);
        let temperatures: Vec<f32> =
            (0..HOURS_6).map(|s| value(&sample(5, &turbine, s), &turbine, "inlet_temp_c")).collect();
        let leap = temperatures.windows(2).map(|w| (w[1] - w[0]).abs()).fold(0.0, f32::max);
        let low = temperatures.iter().copied().fold(f32::MAX, f32::min);
        let high = temperatures.iter().copied().fold(f32::MIN, f32::max);
        assert!(high - low > 20.0, "load cycles move it: {low}..{high}");
        assert!(leap < (high - low) / 8.0, "in small steps: {leap} of {low}..{high}");
    }

    #[test]
    fn power_fuel_and_speed_go_together() {
        let turbine = Device::new(12);
        let series = |name: &str| -> Vec<f32> {
            (0..HOURS_6).map(|s| value(&sample(5, &turbine, s), &turbine, name)).collect()
        };
        let (power, fuel, rpm) = (series("power_kw"), series("fuel_flow_kg_h"), series("rpm"));
        assert!(correlation(&power, &fuel) > 0.9);
        assert!(correlation(&power, &rpm) > 0.9);
    }

    fn correlation(a: &[f32], b: &[f32]) -> f32 {
        let mean = |v: &[f32]| v.iter().sum::<f32>() / v.len() as f32;
        let (ma, mb) = (mean(a), mean(b));
        let covariance: f32 = a.iter().zip(b).map(|(x, y)| (x - ma) * (y - mb)).sum();
        let spread = |v: &[f32], m: f32| v.iter().map(|x| (x - m) * (x - m)).sum::<f32>().sqrt();
        covariance / (spread(a, ma) * spread(b, mb))
    }

    #[test]
    fn faults_develop_from_warning_to_critical_and_heal() {
        let mut seen = HashMap::new();
        for number in 0..200 {
            let device = Device::new(number);
            let mut previous = sample(9, &device, 0).status.state;
            for sequence in 1..4 * HOURS_6 {
                let state = sample(9, &device, sequence).status.state;
                if state != previous {
                    *seen.entry((previous, state)).or_insert(0_u32) += 1;
                    previous = state;
                }
            }
        }
        for change in [("OK", "WARN"), ("WARN", "CRITICAL"), ("CRITICAL", "WARN"), ("WARN", "OK")] {
            assert!(seen.get(&change).is_some_and(|n| *n > 50), "{change:?}: {seen:?}");
        }
        assert!(!seen.contains_key(&("OK", "CRITICAL")), "never without a warning: {seen:?}");
        assert!(!seen.contains_key(&("CRITICAL", "OK")), "repairs show: {seen:?}");
    }

    #[test]
    fn a_small_part_of_the_fleet_is_in_trouble_at_any_time_and_shows_it() {
        let mut states: HashMap<&str, u32> = HashMap::new();
        let (mut healthy, mut failing) = (Vec::new(), Vec::new());
        for number in 0..20_000 {
            let device = Device::new(number);
            let sample = sample(11, &device, 10);
            *states.entry(sample.status.state).or_default() += 1;
            let code = sample.status.code;
            assert!(code.starts_with(device.device_type.id_prefix), "{code}");
            if device.device_type.name == "turbine" {
                let vibration = value(&sample, &device, "vibration_mm_s");
                match code {
                    "TURB-OK" => healthy.push(vibration),
                    "TURB-C-VIB" => failing.push(vibration),
                    _ => {}
                }
            }
        }
        assert!((100..600).contains(&states["WARN"]), "{states:?}");
        assert!((50..400).contains(&states["CRITICAL"]), "{states:?}");
        let mean = |v: &[f32]| v.iter().sum::<f32>() / v.len() as f32;
        assert!(mean(&failing) > 2.0 * mean(&healthy), "the cause is in the metrics");
    }
}
