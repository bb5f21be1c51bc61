//! Any bytes from a broker, in pieces as sockets give them: no panic, no packet that is waited for though it is there, and no
//! more memory than the bytes themselves allow.

#![no_main]

use bytes::BytesMut;
use consumers::mqtt::packet::{PacketError, parse};
use libfuzzer_sys::fuzz_target;

const MAX_PACKET: usize = 1 << 16;

fn packets(bytes: &[u8], piece: usize) -> (Vec<String>, Option<PacketError>, usize) {
    let mut buffer = BytesMut::new();
    let mut packets = Vec::new();
    for piece in bytes.chunks(piece) {
        buffer.extend_from_slice(piece);
        loop {
            let before = buffer.len();
            match parse(&mut buffer, MAX_PACKET) {
                Ok(Some(packet)) => {
                    assert!(buffer.len() < before, "a packet takes its bytes out");
                    packets.push(format!("{packet:?}"));
                }
                Ok(None) => break,
                Err(error) => return (packets, Some(error), 0),
            }
        }
    }
    let left = buffer.len();
    assert!(left < MAX_PACKET + 5, "a whole frame is waited for");
    (packets, None, left)
}

fuzz_target!(|input: &[u8]| {
    let Some((piece, bytes)) = input.split_first() else { return };
    let at_once = packets(bytes, bytes.len().max(1));
    let in_pieces = packets(bytes, usize::from(*piece).max(1));
    assert_eq!(at_once, in_pieces, "the cut of the pieces makes no difference");
});
