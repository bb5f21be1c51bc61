//! The shell of the person on call: bash, in which what a page says is pasted as it stands.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::tcp::OwnedWriteHalf;
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

/// One command of a page; the slowest is a failover that is waited for.
const LIMIT: Duration = Duration::from_secs(120);
const MARK: &str = "=== done";

/// Who starts and stops services: Docker is not here, so that the test does it.
const DOCKER: &str = r#"
docker() {
    local answer
    exec 9<>"/dev/tcp/127.0.0.1/$DOCKER_PORT" && printf '%s\n' "$*" >&9 && read -r answer <&9
    exec 9>&-
    [ "$answer" = done ] || { echo "docker $*: $answer"; return 1; }
}
set -E -o pipefail
trap 'failed="$failed [$BASH_COMMAND]"' ERR
"#;

pub(super) struct Shell {
    _child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    docker: TcpListener,
    /// Words of the pages and what they are here: ports, and what a person fills in.
    words: Vec<(String, String)>,
}

/// What a shell says next.
pub(super) enum Said {
    /// `docker ..`, which waits for an answer.
    Docker(String, OwnedWriteHalf),
    /// Everything that was printed, and which commands failed.
    Done { output: String, failed: String },
}

impl Shell {
    /// In a directory that looks like the root of the project.
    pub(super) async fn open(dir: &Path, words: Vec<(String, String)>) -> Self {
        let docker = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = docker.local_addr().unwrap().port();
        let mut child = Command::new("bash")
            .args(["--noprofile", "--norc"])
            .current_dir(dir)
            .env("DOCKER_PORT", port.to_string())
            .env("PAGER", "cat")
            .env_remove("TIER0_DIR")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        input.write_all(DOCKER.as_bytes()).await.unwrap();
        let output = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { _child: child, input, output, docker, words }
    }

    /// From now on a word that a person fills in.
    pub(super) fn fill_in(&mut self, word: &str, value: &str) {
        self.words.insert(0, (word.to_owned(), value.to_owned()));
    }

    /// Pastes a command. Variables and functions stay for the next.
    pub(super) async fn paste(&mut self, text: &str) {
        let text = translate(text, &self.words).replace('\'', r"'\''");
        let line = format!("failed=; eval '{text}' </dev/null 2>&1; echo; echo \"{MARK}$failed\"\n");
        self.input.write_all(line.as_bytes()).await.unwrap();
    }

    /// Waits for what the shell says next; `output` holds what it has said before.
    pub(super) async fn next(&mut self, output: &mut String) -> Said {
        let said = async {
            loop {
                tokio::select! {
                    line = self.output.next_line() => {
                        let line = line.unwrap().unwrap_or_else(|| panic!("the shell has ended: {output}"));
                        if let Some(failed) = line.strip_prefix(MARK) {
                            let output = std::mem::take(output);
                            return Said::Done { output, failed: failed.trim().to_owned() };
                        }
                        output.push_str(&line);
                        output.push('\n');
                    }
                    caller = self.docker.accept() => return asked(caller.unwrap().0).await,
                }
            }
        };
        timeout(LIMIT, said).await.unwrap_or_else(|_| panic!("no end within {LIMIT:?}"))
    }
}

async fn asked(caller: TcpStream) -> Said {
    let (read, write) = caller.into_split();
    let line = BufReader::new(read).lines().next_line().await.unwrap().unwrap();
    Said::Docker(line, write)
}

/// What a page means here: each word as it stands, by the list.
fn translate(text: &str, words: &[(String, String)]) -> String {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let (mut translated, mut rest) = (String::new(), text);
    while let Some(first) = rest.chars().next() {
        let end = rest.find(|c| is_word(c) != is_word(first)).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        let known = words.iter().find(|(known, _)| known == word);
        translated.push_str(known.map_or(word, |(_, value)| value));
        rest = after;
    }
    translated
}

#[test]
fn words_of_a_page_are_translated_as_a_whole() {
    let words = [("8003", "21000"), ("HOST", "127.0.0.1")].map(|(a, b)| (a.to_owned(), b.to_owned()));
    let translated = translate("curl localhost:8003/status; x 18003 HOST HOSTS 'é8003'", &words);
    assert_eq!(translated, "curl localhost:21000/status; x 18003 127.0.0.1 HOSTS 'é21000'");
}
