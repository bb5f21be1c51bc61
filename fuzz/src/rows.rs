//! A reader of the binary COPY format, as the server reads it.

/// Fields of each row; `None`: NULL. `None` altogether when the bytes are not a COPY of whole rows.
#[must_use]
pub fn read(copy: &[u8]) -> Option<Vec<Vec<Option<&[u8]>>>> {
    let mut rest = copy.strip_prefix(ingest::copy::HEADER)?;
    let mut rows = Vec::new();
    loop {
        let (count, after) = rest.split_first_chunk::<2>()?;
        let count = i16::from_be_bytes(*count);
        rest = after;
        if count == -1 {
            return rest.is_empty().then_some(rows);
        }
        let mut row = Vec::new();
        for _ in 0..count {
            let (length, after) = rest.split_first_chunk::<4>()?;
            let length = i32::from_be_bytes(*length);
            let field = usize::try_from(length).ok();
            let (bytes, after) = after.split_at_checked(field.unwrap_or(0))?;
            row.push(field.map(|_| bytes));
            rest = after;
        }
        rows.push(row);
    }
}
