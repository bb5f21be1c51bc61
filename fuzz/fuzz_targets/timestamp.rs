//! Any text as a time: no panic, no time out of range, and the stricter reader is never contradicted by the others.

#![no_main]

use ingest::timestamp::{Parsed, parse, parse_epoch, parse_iso_8601, parse_rfc_3339};
use libfuzzer_sys::fuzz_target;

/// Years 0 to 9999.
fn in_range(us: i64) {
    assert!((-62_300_000_000_000_000..=253_500_000_000_000_000).contains(&us), "{us}");
}

fuzz_target!(|text: &[u8]| {
    let strict = parse_rfc_3339(text);
    let iso = parse_iso_8601(text);
    if strict.is_some() {
        assert_eq!(strict, iso);
        assert_eq!(strict.and_then(Parsed::utc), parse(text));
    }
    iso.and_then(Parsed::utc).into_iter().for_each(in_range);
    if let Some(us) = parse_epoch(text) {
        in_range(us);
        assert!(iso.is_none(), "both a count and a date");
    }
});
