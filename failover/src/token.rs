//! Bearer tokens, compared in constant time.

use axum::http::{HeaderMap, header};
use service::secret::Secret;
use subtle::ConstantTimeEq;

/// Shorter ones can be guessed.
pub const MIN_LENGTH: usize = 16;

/// Whether the request carries the token. Takes the same time wherever the first difference is.
#[must_use]
pub fn is_borne(headers: &HeaderMap, token: &Secret) -> bool {
    let Some(given) =
        headers.get(header::AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "))
    else {
        return false;
    };
    token.expose().len() >= MIN_LENGTH && bool::from(given.ct_eq(token.expose().as_bytes()))
}

/// # Errors
/// When the token is missing or too short; names the key.
pub fn check(key: &str, token: &Secret) -> Result<(), String> {
    if token.expose().len() < MIN_LENGTH {
        return Err(format!("{key} must be set, with at least {MIN_LENGTH} characters; there is no default"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_token_is_accepted() {
        let token = Secret::new("0123456789abcdef");
        let with = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            headers
        };
        assert!(is_borne(&with("Bearer 0123456789abcdef"), &token));
        for wrong in ["", "0123456789abcdef", "Bearer ", "Bearer 0123456789abcde", "Bearer 0123456789abcdef0"]
        {
            assert!(!is_borne(&with(wrong), &token), "{wrong}");
        }
        assert!(!is_borne(&HeaderMap::new(), &token));
        assert!(!is_borne(&with("Bearer "), &Secret::default()), "no token set: nobody is let in");
    }
}
