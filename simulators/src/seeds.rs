//! Chance by seed: the same key gives the same number on every machine, in every run.
//!
//! Everything a simulator makes up is a function of keys (seed, device, sequence), never the state of a generator:
//! any reading can be made again at any time, alone and in any order.

/// Mixes a key into 64 even bits (the finaliser of SplitMix64: every input bit moves about half of the output).
#[must_use]
pub fn mix(key: u64) -> u64 {
    let mut z = key.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A key made of two.
#[must_use]
pub fn join(key: u64, part: u64) -> u64 {
    mix(key ^ part.wrapping_mul(0xd6e8_feb8_6659_fd93))
}

/// Even over `0.0..1.0`, from the upper bits of a mixed key.
#[must_use]
#[allow(clippy::cast_precision_loss, reason = "24 bits fit a float's mantissa")]
pub fn unit(bits: u64) -> f32 {
    (bits >> 40) as f32 / (1_u64 << 24) as f32
}

/// A smooth wave through random knots, -1.0..=1.0: one knot every `2^octave` steps, eased in between. Neighbouring
/// steps differ by at most `3 / 2^octave`, which is what gives the machines their inertia.
#[must_use]
#[allow(clippy::cast_precision_loss, reason = "the step within a knot is below 2^24")]
pub fn wave(key: u64, step: u64, octave: u32) -> f32 {
    let knot = step >> octave;
    let from = unit(join(key, knot));
    let to = unit(join(key, knot + 1));
    let x = (step & ((1 << octave) - 1)) as f32 / (1_u64 << octave) as f32;
    let eased = x * x * (3.0 - 2.0 * x);
    2.0 * (from + (to - from) * eased) - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_even_over_their_range() {
        let n = 100_000_u32;
        let values: Vec<f32> = (0..n).map(|i| unit(mix(u64::from(i)))).collect();
        assert!(values.iter().all(|v| (0.0..1.0).contains(v)));
        let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / f64::from(n);
        assert!((mean - 0.5).abs() < 0.005, "{mean}");
    }

    #[test]
    fn a_wave_moves_by_small_steps_and_still_gets_around() {
        let values: Vec<f32> = (0..100_000).map(|step| wave(7, step, 8)).collect();
        let leap = values.windows(2).map(|w| (w[1] - w[0]).abs()).fold(0.0, f32::max);
        assert!(leap <= 3.0 / 256.0, "{leap}");
        let (low, high) = values.iter().fold((1.0_f32, -1.0_f32), |(l, h), v| (l.min(*v), h.max(*v)));
        assert!(low < -0.9 && high > 0.9, "{low} {high}");
    }
}
