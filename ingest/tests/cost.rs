//! A message may cost no more than its own size: hostile messages of every shape we know, against the oracle of the fuzz targets.
//!
//! A binary of its own, with one test: the oracle counts the memory of the whole process.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests may panic")]

#[path = "../../fuzz/src/cost.rs"]
#[allow(unreachable_pub, reason = "the fuzz targets use it as a module of a library")]
mod cost;

use std::io::Write;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use ingest::reading::Rules;
use ingest::settings::{IngestSettings, LenientSettings};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

const TOPIC: &[u8] = b"og/field/TX-EAGLE/turbine/TURB-00417";

fn reading(metrics: &str) -> String {
    format!(
        "{{\"device_id\":\"TURB-00417\",\"device_type\":\"turbine\",\"site_id\":\"TX-EAGLE\",\
         \"timestamp_utc\":\"2026-02-03T04:05:06Z\",\"metrics\":{metrics}}}"
    )
}

fn rules() -> Rules {
    let lenient = LenientSettings { non_finite_as_null: true, ..LenientSettings::default() };
    let settings = IngestSettings { lenient, ..IngestSettings::default() };
    let tolerance = ingest::reading::Tolerance::new(&settings).into();
    Rules { tolerance, ..Rules::new(1_700_000_000_000_000, 1_800_000_000_000_000, 256 << 10) }
}

/// Messages of about `size` bytes.
fn shapes(size: usize) -> Vec<String> {
    let fill = |unit: &str| unit.repeat(size / unit.len());
    let long = "x".repeat(size);
    let mut shapes: Vec<String> = [
        "0,",
        "[],",
        "{},",
        "\"\",",
        "null,",
        ",",
        "x,",
        "NaN,",
        "1e999,",
        "[",
        "{\"a\":",
        "{\"",
        ",{\"",
        "{\"1, {\"1\",{\"",
        "[[[],[",
        "]",
        "}",
        "\\",
        "\"",
        "\\\"",
        "\u{e9}",
        "{\"device_id\":\"x",
        "{\"device_id\":\"TURB-00417\"},",
        "-",
        " ",
        "\n",
    ]
    .iter()
    .map(|unit| format!("[{}", fill(unit)))
    .collect();
    for unit in
        ["[],", "1,", "0,", "1e308,", "\"\\u00e9\",", "{\"a\":0},", "NaN,", "-Infinity,", "\"\\ud800\","]
    {
        shapes.push(reading(&format!("{{\"v\":[{}0]}}", fill(unit))));
        shapes.push(format!("[{}]", reading(&format!("{{\"v\":[{}0]}}", fill(unit)))));
    }
    for unit in ["\"\":0,", "\"a\":0,", "\"a\":1e7600,", "\"\\u0000\":0,"] {
        shapes.push(reading(&format!("{{{}\"z\":0}}", fill(unit))));
    }
    shapes.push(reading(&format!("{{\"v\":{}{}}}", "[".repeat(size / 2), "]".repeat(size / 2))));
    shapes.push(reading(&format!("{{\"v\":{}}}", "7".repeat(size))));
    shapes.push(reading(&format!("{{\"v\":0.{}e-1}}", "0".repeat(size))));
    for (from, to) in [
        ("TURB-00417", long.clone()),
        ("\"TURB-00417\"", "4".repeat(size)),
        ("TX-EAGLE", long.clone()),
        ("2026-02-03T04:05:06Z", long.clone()),
        ("\"2026-02-03T04:05:06Z\"", "1".repeat(size)),
        ("\"metrics\"", format!("\"{long}\"")),
        ("{}", format!("\"{long}\"")),
        ("TX-EAGLE", "\\u0041".repeat(size / 6)),
    ] {
        shapes.push(reading("{}").replace(from, &to));
        shapes.push(format!("[{},7]", reading("{}").replace(from, &to)));
    }
    let readings = vec![reading("{}"); size / 150].join(",");
    shapes.push(format!("[{readings}]"));
    shapes.push(format!("[{}]", readings.replace("TX-EAGLE", &"S".repeat(256))));
    shapes.push(format!("[{}]", readings.replace("\"metrics\":{}", "\"metrics\":NaN")));
    shapes.push(format!("[{}]", readings.replace("{}}", "{}")));
    shapes.push(format!("\"{long}\""));
    shapes.push(format!("[\"{long}\"]"));
    shapes
}

/// The same for user activity.
fn session_shapes(size: usize) -> Vec<String> {
    let mut shapes = shapes(size);
    let entry = r#"{"session_id":"S","user_id":"u","connection_status":"idle"}"#;
    for list in ["0,", "[],", "{},", "\"\",", ",", "x,", "{\"", "[", &format!("{entry},")] {
        for end in ["0]}", "]", ""] {
            shapes.push(format!(
                "{{\"site_id\":\"W\",\"timestamp_utc\":\"2026-02-03T04:05:06Z\",\"metrics\":{{}},\"active_users_list\":[{}{end}",
                list.repeat(size / list.len())
            ));
        }
    }
    shapes
}

fn gzip(text: &[u8]) -> Bytes {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap().into()
}

fn check(topic: &[u8], message: &Bytes, rules: &Rules) {
    let (cost, unpacked) = cost::of_telemetry(topic, message, rules);
    cost.check(message.len(), unpacked);
    let (cost, unpacked) = cost::of_session(message, rules);
    cost.check(message.len(), unpacked);
}

#[test]
fn no_message_costs_more_than_its_size_allows() {
    let rules = rules();
    let long_topic = [b"og/field/", "S".repeat(60_000).as_bytes(), b"/turbine/TURB-00417"].concat();
    let wide_topic = [b"og/field/", "S".repeat(700).as_bytes(), b"/turbine/TURB-00417"].concat();
    for size in [100, 4_000, 60_000, 250_000, 400_000] {
        for shape in shapes(size).into_iter().chain(session_shapes(size)) {
            let message = Bytes::from(shape);
            for topic in [TOPIC, &wide_topic, &long_topic] {
                check(topic, &message, &rules);
            }
            check(TOPIC, &gzip(&message), &rules);
        }
    }
    let bomb = gzip(&vec![b' '; 50 << 20]);
    check(TOPIC, &bomb, &rules);
    // A zstd frame that asks for the largest window, and holds nothing.
    check(TOPIC, &Bytes::from_static(&[0x28, 0xb5, 0x2f, 0xfd, 0, 0x68, 1, 0, 0]), &rules);

    let mut runner = TestRunner::default();
    let anything = (
        prop::collection::vec(any::<u8>(), 0..2_000),
        r#"\[?[\[\]{}:,"\\0-9a-fA-FtrulsenNI+\-. \n]{0,300}"#,
        0..2_000_usize,
    );
    let outcome = runner.run(&anything, |(bytes, text, at)| {
        check(TOPIC, &Bytes::from(bytes), &rules);
        let array = format!("[{},{text},{}]", reading("{}"), reading("{\"v\":1}"));
        check(TOPIC, &Bytes::copy_from_slice(&array.as_bytes()[..at.min(array.len())]), &rules);
        check(TOPIC, &Bytes::from(array), &rules);
        Ok(())
    });
    outcome.unwrap();
}
