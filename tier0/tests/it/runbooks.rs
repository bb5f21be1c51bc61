//! Runbooks, followed word by word: a cluster is brought into the trouble that a page is for, what the page tells people to type
//! is typed as it stands, and then the page's "Resolved when" holds, and nothing that was acknowledged is lost.
//!
//! Ports and what a person fills in are translated by `shell.rs`; `docker compose up` and `stop` are done to our processes by
//! `bed.rs`; the rest runs in a shell that has pasted the playground's block of docs/runbooks/README.md. Nothing is skipped in
//! silence: `book.rs`.

mod bed;
mod book;
mod kept;
mod one_copy;
mod orchestrator;
mod primaries;
mod redis;
mod shell;
mod writers;

use book::Excuse;

/// What every page may say for Docker, whose world is not here.
const COMPOSE: &str = "Docker Compose; the playground's commands are followed";
const THE_SAME: &str = "the same by the program; another test follows it";

/// docs/runbooks/state-in-doubt.md, whose last step is written twice: as a request and as a command.
fn state_in_doubt(other_way: Excuse) -> book::Book {
    book::Book::open("state-in-doubt", &[other_way])
}
