//! Texts of errors, which may quote what a stranger has sent.

/// Longest error text, in bytes. Every dead letter has one.
pub const MAX_ERROR_BYTES: usize = 500;

/// An error text of bounded length.
pub(crate) fn cut(mut error: String) -> String {
    if error.len() > MAX_ERROR_BYTES {
        error.truncate(error.floor_char_boundary(MAX_ERROR_BYTES - "…".len()));
        error.push('…');
    }
    error
}
