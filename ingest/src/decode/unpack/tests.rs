//! Compressed messages, good, broken and hostile.

use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

use super::*;

fn gzip(text: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

fn zstd(text: &[u8]) -> Vec<u8> {
    compress_to_vec(text, CompressionLevel::Fastest)
}

fn unpacked(bytes: &[u8]) -> Result<(Bytes, Tolerances), Rejection> {
    let mut payload = Bytes::copy_from_slice(bytes);
    let tolerated = unpack(&mut payload, &Rules::new(0, i64::MAX, 256 << 10))?;
    Ok((payload, tolerated))
}

const TEXT: &[u8] = b"{\"device_id\":\"TURB-00417\",\"metrics\":{\"rpm\":3412}}";

#[test]
fn what_was_compressed_comes_out() {
    for packed in [gzip(TEXT), zstd(TEXT), [&gzip(TEXT)[..], b"\0\0"].concat()] {
        let (payload, tolerated) = unpacked(&packed).unwrap();
        assert_eq!(payload, TEXT);
        assert!(tolerated.contains(Tolerated::Compressed));
    }
    assert_eq!(unpacked(TEXT).unwrap(), (Bytes::from_static(TEXT), Tolerances::NONE));
    let marked = gzip(&[BYTE_ORDER_MARK, TEXT, b"\0"].concat());
    let (payload, tolerated) = unpacked(&marked).unwrap();
    assert_eq!(payload, TEXT);
    assert!(tolerated.contains(Tolerated::Compressed) && tolerated.contains(Tolerated::Padding));
}

#[test]
fn every_cut_and_every_damaged_byte_is_refused_or_harmless() {
    for packed in [gzip(TEXT), zstd(TEXT)] {
        for length in 4..packed.len() {
            let error = unpacked(&packed[..length]).unwrap_err();
            assert_eq!(error.reason, Reason::NotJson, "{length}: {}", error.error);
        }
        for at in 4..packed.len() {
            for bit in 0..8 {
                let mut damaged = packed.clone();
                damaged[at] ^= 1 << bit;
                if let Ok((payload, _)) = unpacked(&damaged) {
                    assert!(payload.len() <= 32 * damaged.len() + 4096);
                }
            }
        }
        let followed = [&packed[..], b"more"].concat();
        assert!(unpacked(&followed).unwrap_err().error.contains("4 bytes after"));
    }
}

#[test]
fn a_bomb_is_too_large() {
    let zeros = vec![b'0'; 100 << 20];
    for bomb in [gzip(&zeros[..200 << 10]), gzip(&zeros), zstd(&zeros[..200 << 10]), zstd(&zeros)] {
        let rejection = unpacked(&bomb).unwrap_err();
        assert_eq!(rejection.reason, Reason::TooLarge, "{}", rejection.error);
        assert!(rejection.error.contains("the limit for this message"));
    }
    // Within both limits.
    let (payload, _) = unpacked(&gzip(&zeros[..4 << 10])).unwrap();
    assert_eq!(payload.len(), 4 << 10);
}

#[test]
fn a_zstd_frame_with_a_giant_window_is_refused_before_it_is_reserved() {
    // Windows of 16 MiB and of 2^41 bytes and more, then an empty last block.
    for window in [0x70, 0xff] {
        let frame = [ZSTD, &[0x00, window, 0x01, 0x00, 0x00]].concat();
        let rejection = unpacked(&frame).unwrap_err();
        assert_eq!(rejection.reason, Reason::NotJson);
        assert!(rejection.error.to_lowercase().contains("window"), "{}", rejection.error);
    }
}
