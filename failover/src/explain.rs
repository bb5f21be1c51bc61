//! Every refusal is JSON with a code and a sentence that says what to do: also those that the HTTP library makes before
//! our handlers are reached (no such path, a body that is no JSON).

use axum::body::{Body, to_bytes};
use axum::http::{StatusCode, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use failover_api::Problem;

/// Of a text that the library made.
const MOST: usize = 4 << 10;

/// Explains what goes wrong in `routes`. `see` says where callers find what they may ask.
pub fn explained(routes: Router, see: &'static str) -> Router {
    routes.layer(middleware::map_response(move |response| explain(response, see)))
}

async fn explain(response: Response, see: &'static str) -> Response {
    let status = response.status();
    let kind = response.headers().get(header::CONTENT_TYPE);
    let ours = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
    if ours || !(status.is_client_error() || status.is_server_error()) {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    let text = to_bytes(body, MOST).await.unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let text = text.trim().trim_end_matches('.');
    let (code, message) = match status {
        StatusCode::NOT_FOUND => ("not_found", format!("there is nothing at this path; {see}")),
        StatusCode::METHOD_NOT_ALLOWED => {
            ("method_not_allowed", format!("this path takes another method, see the header Allow; {see}"))
        }
        StatusCode::PAYLOAD_TOO_LARGE => {
            ("too_large", format!("the body is larger than any request here has to be; {see}"))
        }
        StatusCode::UNSUPPORTED_MEDIA_TYPE => {
            ("not_json", "send the body as JSON, with the header Content-Type: application/json".to_owned())
        }
        _ if status.is_client_error() => ("bad_request", format!("{text}; {see}")),
        _ => ("failed", format!("{text}; the log of this process says more")),
    };
    parts.headers.remove(header::CONTENT_TYPE);
    parts.headers.remove(header::CONTENT_LENGTH);
    let mut explained = (status, Json(Problem::new(code, message))).into_response();
    explained.headers_mut().extend(parts.headers);
    explained.map(Body::new)
}

#[cfg(test)]
mod tests {
    use axum::extract::Query;
    use axum::routing::{get, post};
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Asked {
        number: u32,
    }

    #[tokio::test]
    async fn what_the_library_refuses_is_explained() {
        let routes = Router::new()
            .route("/get", get(|Query(asked): Query<Asked>| async move { asked.number.to_string() }))
            .route("/post", post(|Json(asked): Json<Asked>| async move { asked.number.to_string() }))
            .route("/ours", get(|| async { (StatusCode::CONFLICT, Json(Problem::new("ours", "as it is"))) }));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let mut server = tokio::task::JoinSet::new();
        server.spawn(axum::serve(listener, explained(routes, "see the manual")).into_future());
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let json = |body: &'static str| {
            client.post(format!("{url}/post")).header(header::CONTENT_TYPE, "application/json").body(body)
        };
        let large = format!("{{\"number\": {}1}}", " ".repeat(3 << 20));
        for (request, status, code, says) in [
            (client.get(format!("{url}/get?number=x")), 400, "bad_request", "invalid digit"),
            (client.get(format!("{url}/nowhere")), 404, "not_found", "see the manual"),
            (client.delete(format!("{url}/get")), 405, "method_not_allowed", "another method"),
            (
                client.post(format!("{url}/post")).body("{}"),
                415,
                "not_json",
                "Content-Type: application/json",
            ),
            (json("{"), 400, "bad_request", "JSON"),
            (json("{\"number\": \"x\"}"), 422, "bad_request", "expected u32"),
            (json("{}").body(large), 413, "too_large", "larger"),
            (client.get(format!("{url}/ours")), 409, "ours", "as it is"),
        ] {
            let answer = request.send().await.unwrap();
            assert_eq!(answer.status().as_u16(), status);
            assert_eq!(answer.headers().contains_key(header::ALLOW), status == 405);
            let problem: Problem = answer.json().await.unwrap();
            assert_eq!(problem.error.code, code, "{problem:?}");
            assert!(problem.error.message.contains(says), "{problem:?}");
        }
        let fine = client.get(format!("{url}/get?number=7")).send().await.unwrap();
        assert_eq!(fine.text().await.unwrap(), "7");
    }
}
