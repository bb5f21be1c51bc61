//! One line a second, for pipes and logs.

use super::sample::Sample;

/// `   12 s  in 20011/s  rows 19987/s  p50 31 ms ...`
pub(super) fn line(sample: &Sample) -> String {
    let dead: u64 = sample.dead_letters.values().sum();
    let mut text = format!(
        "{:>5.0} s  in {:>6.0}/s  rows {:>6.0}/s  p50 {}  p95 {}  p99 {}  batch {:>5.0}  in flight {:>6}  lag {}",
        sample.seconds,
        sample.received_rate,
        sample.committed_rate,
        latency(sample.p50),
        latency(sample.p95),
        latency(sample.p99),
        sample.batch_rows.unwrap_or(0.0),
        sample.rows_in_flight + sample.queue_messages,
        lag(sample.flush_lag_bytes),
    );
    if let Some(rate) = sample.session_rate {
        text.push_str(&format!("  sessions {rate:.0}/s"));
    }
    for (name, value) in
        [("dead letters", dead), ("duplicates", sample.duplicates), ("retries", sample.retries)]
    {
        if value > 0 {
            text.push_str(&format!("  {name} {value}"));
        }
    }
    if sample.behind_seconds >= 1.0 {
        text.push_str(&format!("  simulator {:.0} s behind", sample.behind_seconds));
    }
    text
}

pub(super) fn latency(seconds: Option<f64>) -> String {
    match seconds {
        None => "     -".into(),
        Some(seconds) if seconds < 10.0 => format!("{:>4.0} ms", seconds * 1000.0),
        Some(seconds) => format!("{seconds:>5.0} s"),
    }
}

pub(super) fn lag(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "no standby".into(), |bytes| format!("{bytes:>7} B"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_trouble_only_when_there_is_some() {
        let calm = Sample { seconds: 3.0, p50: Some(0.031), flush_lag_bytes: Some(0), ..Sample::default() };
        let text = line(&calm);
        assert!(text.contains("p50   31 ms"), "{text}");
        assert!(!text.contains("dead letters") && !text.contains("behind"), "{text}");
        let trouble = Sample {
            dead_letters: [("not_json".to_owned(), 2), ("wrong_type".to_owned(), 1)].into(),
            behind_seconds: 2.5,
            ..calm
        };
        assert!(line(&trouble).contains("dead letters 3  simulator 2 s behind"), "{}", line(&trouble));
    }
}
