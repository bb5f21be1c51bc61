//! What a topic is taken apart into is what it is put together from.

#![no_main]

use libfuzzer_sys::fuzz_target;
use wire::topic::{MAX_BYTES, Topic};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(topic) = Topic::parse(bytes) {
        assert!(bytes.len() <= MAX_BYTES);
        assert_eq!(topic.to_string().as_bytes(), bytes);
        let levels = [topic.site_id, topic.device_type, topic.device_id];
        assert!(levels.iter().all(|level| !level.is_empty() && !level.contains('/')));
    }
});
