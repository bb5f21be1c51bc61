//! One GET over loopback: what a scraper or a probe does, without a client library.

use std::time::Duration;

use anyhow::{Context, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const LIMIT: Duration = Duration::from_secs(3);
/// More than any page of ours; a run-away answer must not fill the memory.
const MAX_BYTES: u64 = 32 << 20;

/// Status and body of `GET http://127.0.0.1:PORT/PATH`.
///
/// # Errors
/// When there is no complete answer within 3 s.
pub async fn get(port: u16, path: &str) -> anyhow::Result<(u16, String)> {
    get_within(port, path, LIMIT).await
}

/// As [`get`], for whoever has no other use for the time.
///
/// # Errors
/// When there is no complete answer within `limit`.
pub async fn get_within(port: u16, path: &str, limit: Duration) -> anyhow::Result<(u16, String)> {
    send(port, &format!("GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n"), limit)
        .await
        .with_context(|| format!("GET http://127.0.0.1:{port}{path}"))
}

/// Status and body of a `POST` with a bearer token and a JSON body, which may be empty.
///
/// # Errors
/// When there is no complete answer within `limit`.
pub async fn post(
    port: u16,
    path: &str,
    token: &str,
    body: &str,
    limit: Duration,
) -> anyhow::Result<(u16, String)> {
    let head = format!(
        "POST {path} HTTP/1.0\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\nX-Actor: tier0\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    send(port, &head, limit).await.with_context(|| format!("POST http://127.0.0.1:{port}{path}"))
}

async fn send(port: u16, request: &str, limit: Duration) -> anyhow::Result<(u16, String)> {
    let exchange = async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.context("connect")?;
        // HTTP/1.0: the server closes the connection after its answer and sends no chunks.
        stream.write_all(request.as_bytes()).await.context("send the request")?;
        let mut answer = Vec::new();
        stream.take(MAX_BYTES).read_to_end(&mut answer).await.context("read the answer")?;
        parse(&String::from_utf8_lossy(&answer))
    };
    match tokio::time::timeout(limit, exchange).await {
        Ok(answer) => answer,
        Err(_) => bail!("no answer within {limit:?}"),
    }
}

fn parse(answer: &str) -> anyhow::Result<(u16, String)> {
    let (head, body) = answer.split_once("\r\n\r\n").context("the answer has no end of headers")?;
    let status =
        head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("the answer has no status")?;
    Ok((status, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_an_answer_apart() {
        assert_eq!(
            parse("HTTP/1.0 503 Service Unavailable\r\na: b\r\n\r\n{}\r\n\r\nx").unwrap(),
            (503, "{}\r\n\r\nx".into())
        );
        assert!(parse("garbage").is_err());
    }
}
