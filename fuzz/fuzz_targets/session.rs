//! Any message through the decoder of user activity, with the oracle of cost.

#![no_main]

use bytes::Bytes;
use fuzz::{cost, rules};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((choice, payload)) = input.split_first() else { return };
    let rules = rules(*choice);
    let message = Bytes::copy_from_slice(payload);
    let (cost, unpacked) = cost::of_session(&message, &rules);
    cost.check(message.len(), unpacked);
});
