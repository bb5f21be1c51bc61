//! What the pages tell people to type: every command is parsed by the program it is for, every target, setting, variable, path
//! and link is there, every query and request is asked in a living system (`dashboards.rs` has one). A block of code that is neither
//! checked nor excused fails.

mod commands;
pub(crate) mod live;
mod names;
pub(crate) mod pages;
mod shell;

use std::collections::BTreeSet;

use commands::Commands;
use live::Ask;
use names::Names;

const FOLLOWED: &str = "the runbook's own test carries it out, runbooks/kept.rs";
/// Blocks that nobody can run, by the page and how they begin.
const EXCUSED: [(&str, &str, &str); 10] = [
    ("README.md", "time  ", "the output of a run"),
    ("ARCHITECTURE.md", "socket -> source", "a drawing"),
    (
        "docs/runbooks/README.md",
        "sql()  { target/release",
        "defines sql, get, logs and TOKEN; what the pages ask by them is asked",
    ),
    (
        "docs/runbooks/README.md",
        "on()   { docker",
        "the same for Docker, which is not here; .ci/compose-run.py uses it",
    ),
    ("docs/runbooks/kept-source.md", "data=$(realpath", FOLLOWED),
    ("docs/runbooks/kept-source.md", "data=/var/lib", "the same for Docker"),
    ("docs/runbooks/kept-source.md", "inside rm", FOLLOWED),
    ("docs/runbooks/kept-source.md", "primary=", FOLLOWED),
    ("docs/runbooks/kept-source.md", "kept()", FOLLOWED),
    ("docs/runbooks/kept-source.md", "inside /usr", FOLLOWED),
];

/// What all pages want to have asked; panics with everything that is wrong.
pub(crate) fn asks() -> Vec<Ask> {
    let (mut problems, mut asks, mut used) = (Vec::new(), Vec::new(), BTreeSet::new());
    let (mut commands, names) = (Commands::load(), Names::load());
    let mut checked = 0;
    for page in pages::all() {
        problems.extend(page.links().filter_map(|link| names.link(&page, &link).err()));
        for block in &page.blocks {
            let excuse =
                EXCUSED.iter().position(|(of, start, _)| *of == page.path && block.text.starts_with(start));
            if let Some(excuse) = excuse {
                used.insert(excuse);
                continue;
            }
            match commands.block(&block.text) {
                Ok(found) => asks.extend(found.into_iter().map(|ask| ask.at(&page.path, block.line))),
                Err(problem) => problems.push(format!("{}:{}: {problem}", page.path, block.line)),
            }
            checked += 1;
        }
        for span in &page.spans {
            match commands.span(&span.text).and_then(|found| names.span(&span.text).map(|()| found)) {
                Ok(found) => asks.extend(found.into_iter().map(|ask| ask.at(&page.path, span.line))),
                Err(problem) => {
                    problems.push(format!("{}:{}: `{}`: {problem}", page.path, span.line, span.text))
                }
            }
        }
        for piece in &page.prose {
            if let Err(problem) = commands.prose(&piece.text) {
                problems.push(format!("{}:{}: {problem}", page.path, piece.line));
            }
        }
    }
    for (number, (page, start, _)) in EXCUSED.iter().enumerate() {
        if !used.contains(&number) {
            problems.push(format!("{page} has no block that begins with {start:?}, yet it is excused"));
        }
    }
    assert!(problems.is_empty(), "{} problems:\n  {}", problems.len(), problems.join("\n  "));
    assert!(
        checked > 40 && asks.len() > 30,
        "{checked} blocks, {} asks: are the pages still read?",
        asks.len()
    );
    asks
}

#[test]
fn what_the_pages_tell_people_to_type_exists() {
    asks();
}
