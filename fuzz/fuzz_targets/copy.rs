//! Texts, documents and times in binary COPY format, read back as the server reads them.

#![no_main]

use bytes::{BufMut, BytesMut};
use fuzz::rows;
use ingest::copy;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|rows_in: Vec<(Option<String>, String, i64)>| {
    let mut buffer = BytesMut::new();
    buffer.put_slice(copy::HEADER);
    // Only years 0 to 9999 come out of the decoder.
    let time = |us: i64| us % 200_000_000_000_000_000;
    for (text, document, us) in &rows_in {
        copy::row(&mut buffer, 3);
        match text {
            Some(text) => copy::text(&mut buffer, text),
            None => copy::null(&mut buffer),
        }
        copy::jsonb(&mut buffer, document);
        copy::timestamptz(&mut buffer, time(*us));
    }
    buffer.put_slice(copy::TRAILER);
    let sent: Vec<u8> = copy::messages(buffer.freeze()).flatten().collect();
    let rows = rows::read(&sent).expect("whole rows");
    assert_eq!(rows.len(), rows_in.len());
    for (row, (text, document, us)) in rows.iter().zip(&rows_in) {
        let [a, Some([1, b @ ..]), Some(c)] = row.as_slice() else { panic!("{row:?}") };
        assert_eq!((*a, b), (text.as_ref().map(String::as_bytes), document.as_bytes()));
        let stored = i64::from_be_bytes((*c).try_into().expect("eight bytes"));
        assert_eq!(stored + ingest::timestamp::POSTGRES_EPOCH_US, time(*us));
    }
});
