//! The OpenAPI document, made from the handlers. `failover/openapi.json` is a copy that a test keeps equal.

use utoipa::OpenApi;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};

use crate::orchestrator::api;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Tier0 failover orchestrator",
        description = "Regional failover in under five seconds, with nothing acknowledged lost."
    ),
    paths(api::status, api::history, api::failover, api::mode, api::adopt, api::discard),
    components(schemas(failover_api::Plan, failover_api::AdoptPlan))
)]
struct Document;

/// The document as it is served.
#[must_use]
pub fn document() -> utoipa::openapi::OpenApi {
    let mut document = Document::openapi();
    let scheme = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
    document.components.get_or_insert_default().add_security_scheme("token", scheme);
    document
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `TIER0_WRITE_OPENAPI=1 cargo test -p failover openapi` writes it anew.
    #[test]
    fn the_document_in_the_repository_is_the_one_that_is_served() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi.json");
        let served = document().to_pretty_json().unwrap() + "\n";
        if std::env::var_os("TIER0_WRITE_OPENAPI").is_some() {
            std::fs::write(&path, &served).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), served, "run with TIER0_WRITE_OPENAPI=1");
        for path in
            ["/status", "/history", "/failover/{region}", "/mode", "/adopt/{region}", "/discard/{region}"]
        {
            assert!(served.contains(path), "{path}");
        }
    }
}
