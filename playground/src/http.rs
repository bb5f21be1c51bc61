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
    let request = async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.context("connect")?;
        // HTTP/1.0: the server closes the connection after its answer and sends no chunks.
        let head = format!("GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n");
        stream.write_all(head.as_bytes()).await.context("send the request")?;
        let mut answer = Vec::new();
        stream.take(MAX_BYTES).read_to_end(&mut answer).await.context("read the answer")?;
        parse(&String::from_utf8_lossy(&answer))
    };
    match tokio::time::timeout(LIMIT, request).await {
        Ok(answer) => answer.with_context(|| format!("GET http://127.0.0.1:{port}{path}")),
        Err(_) => bail!("GET http://127.0.0.1:{port}{path}: no answer within {LIMIT:?}"),
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
