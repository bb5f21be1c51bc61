//! Is a command one that somebody understands? Ours are parsed by our programs; requests and queries are left to be asked.

use std::collections::BTreeSet;

use clap::{CommandFactory, Parser};
use tier0::cli::Cli;
use tier0::docs::root;

use super::live::{Ask, What};
use super::shell;
use crate::settings::{self, PROGRAMS};

/// The machine's own, in pipes and loops; nothing of ours that could be wrong.
const FOREIGN: [&str; 35] = [
    "date",
    "awk",
    "base64",
    "cat",
    "cp",
    "cd",
    "cut",
    "df",
    "dmesg",
    "do",
    "done",
    "du",
    "for",
    "free",
    "git",
    "grep",
    "head",
    "journalctl",
    "jq",
    "kill",
    "mv",
    "mosquitto_pub",
    "mosquitto_sub",
    "printf",
    "promtool",
    "redis-cli",
    "sed",
    "sort",
    "ss",
    "tail",
    "tee",
    "test",
    "uniq",
    "while",
    "cargo",
];

pub(super) struct Commands {
    makefile: String,
    compose: String,
    /// Long options of all our programs.
    options: BTreeSet<String>,
}

type Found = Result<Vec<Ask>, String>;

impl Commands {
    pub(super) fn load() -> Self {
        let read = |path: &str| std::fs::read_to_string(root().join(path)).unwrap();
        let mut options = BTreeSet::new();
        collect(&Cli::command(), &mut options);
        for program in PROGRAMS {
            let output = settings::command(program).arg("--help").output().unwrap();
            let help = String::from_utf8(output.stdout).unwrap();
            let words = help.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'));
            options.extend(words.filter_map(|word| word.strip_prefix("--")).map(str::to_owned));
        }
        Self { makefile: read("Makefile"), compose: read("docker-compose.yml"), options }
    }

    /// Every command of a block must be known.
    pub(super) fn block(&mut self, text: &str) -> Found {
        // A message, not a command: the decoder's tests read those of docs/devices.md.
        if text.starts_with(['{', '[']) {
            return Ok(Vec::new());
        }
        let commands = shell::commands(text)?;
        let mut asks = Vec::new();
        for (at, words) in commands.iter().enumerate() {
            let next = commands.get(at + 1);
            match self.command(words, next)? {
                Some(found) => asks.extend(found),
                None => {
                    let first = words.iter().find(|word| !is_assignment(word));
                    if first.is_some_and(|first| !FOREIGN.contains(&first.as_str())) {
                        return Err(format!("nobody checks this: {}", words.join(" ")));
                    }
                }
            }
        }
        Ok(asks)
    }

    /// A span may be anything; what begins like a command must be one.
    pub(super) fn span(&mut self, text: &str) -> Found {
        let options = text.split_whitespace().take(1).filter_map(|word| word.strip_prefix("--"));
        for option in options {
            let option = option.split('=').next().unwrap_or_default();
            if !self.options.contains(option) && option.chars().all(|c| c.is_ascii_lowercase() || c == '-') {
                return Err(format!("no program of ours has --{option}"));
            }
        }
        if !text.contains(' ') {
            return Ok(Vec::new());
        }
        let ours = text.split_whitespace().find(|word| !is_assignment(word)).is_some_and(is_ours);
        let commands = match shell::commands(text) {
            Err(problem) if ours => return Err(problem),
            commands => commands.unwrap_or_default(),
        };
        let mut asks = Vec::new();
        for words in commands {
            asks.extend(self.command(&words, None)?.unwrap_or_default());
        }
        Ok(asks)
    }

    /// A command outside of code is seen by nobody, here and on the page.
    pub(super) fn prose(&self, text: &str) -> Result<(), String> {
        let bare =
            |word: &'_ str| word.trim_matches(|c: char| !c.is_ascii_alphanumeric() && c != '-').to_owned();
        let words: Vec<String> = text.split_whitespace().map(bare).collect();
        for (word, next) in words.iter().zip(words.iter().skip(1)) {
            let command = match word.rsplit('/').next().unwrap_or(word) {
                "tier0" => Cli::command().find_subcommand(next).is_some() || next.starts_with("--"),
                // Alone it is a word like others.
                "make" => next.contains('-') && self.make(&[next]).is_ok(),
                program => PROGRAMS.contains(&program) && next.starts_with("--"),
            };
            if command {
                return Err(format!("{word} {next} is a command: write it as code"));
            }
        }
        Ok(())
    }

    /// `None`: none of ours.
    fn command(&mut self, words: &[String], next: Option<&Vec<String>>) -> Result<Option<Vec<Ask>>, String> {
        let words: Vec<&str> =
            words.iter().map(String::as_str).skip_while(|word| is_assignment(word)).collect();
        let Some((first, rest)) = words.split_first() else { return Ok(Some(Vec::new())) };
        match first.rsplit('/').next().unwrap_or(first) {
            "make" => self.make(rest)?,
            "tier0" => tier0(rest)?,
            "docker" => self.docker(rest)?,
            "logs" => self.logs(rest)?,
            program if PROGRAMS.contains(&program) => run(program, rest)?,
            "curl" => return request(rest, next).map(|ask| Some(vec![ask])),
            "get" => {
                let [at] = rest else { return Err("get PORT/PATH is wanted".into()) };
                return request(&[&format!("localhost:{at}")], next).map(|ask| Some(vec![ask]));
            }
            "sql" => return query(rest).map(|ask| Some(vec![ask])),
            _ => return Ok(None),
        }
        Ok(Some(Vec::new()))
    }

    fn make(&self, words: &[&str]) -> Result<(), String> {
        for word in words {
            if let Some((variable, value)) = word.split_once('=') {
                let used = self.makefile.contains(&format!("$({variable})"))
                    || self.makefile.contains(&format!("$(or $({variable}),"));
                if !used {
                    return Err(format!("the Makefile does not use {variable}"));
                }
                let subcommand = match words {
                    _ if variable != "ARGS" => continue,
                    [
                        target @ ("up" | "bench" | "bench-growth" | "bench-sessions" | "bench-failover"),
                        ..,
                    ] => vec![*target],
                    ["drill-outages", ..] => vec!["drill", "outages"],
                    ["drill-failover", ..] => vec!["drill", "failover"],
                    ["secrets", ..] if value == "--simulators" => continue,
                    other => return Err(format!("what does {other:?} do with ARGS?")),
                };
                let arguments = shell::commands(value)?.concat();
                tier0(
                    &subcommand.into_iter().chain(arguments.iter().map(String::as_str)).collect::<Vec<_>>(),
                )?;
            } else if !self.makefile.lines().any(|line| line.starts_with(&format!("{word}:"))) {
                return Err(format!("the Makefile has no target {word}"));
            }
        }
        Ok(())
    }

    fn has_service(&self, name: &str) -> bool {
        self.compose.lines().any(|line| line == format!("  {name}:"))
    }

    /// Files, profiles and services; compose itself checks the rest (`.ci/compose.py`).
    fn docker(&self, words: &[&str]) -> Result<(), String> {
        let ["compose", rest @ ..] = words else { return Err("only docker compose is spoken of".into()) };
        let mut rest = rest.iter();
        let mut verb = None;
        while let Some(word) = rest.next() {
            match (*word, verb) {
                ("-f", None) => {
                    let file = rest.next().ok_or("-f names no file")?;
                    if !root().join(file).is_file() {
                        return Err(format!("{file} is not there"));
                    }
                }
                ("--profile", None) => {
                    let profile = rest.next().ok_or("which profile?")?;
                    if !self.compose.contains(&format!("profiles: [{profile}]")) {
                        return Err(format!("no service has the profile {profile}"));
                    }
                }
                ("-s" | "--tail" | "-e", Some(_)) => drop(rest.next()),
                (option, _) if option.starts_with('-') => {}
                (word, None) => verb = Some(word),
                // What follows is of the service's own world.
                (service, Some("exec" | "run")) => return self.service(service),
                (service, Some(_)) => self.service(service)?,
            }
        }
        match verb {
            Some(
                "up" | "down" | "ps" | "stop" | "kill" | "exec" | "run" | "logs" | "build" | "restart"
                | "start",
            ) => Ok(()),
            other => Err(format!("docker compose {other:?}?")),
        }
    }

    fn service(&self, name: &str) -> Result<(), String> {
        let placeholder = name.chars().all(|c| c.is_ascii_uppercase());
        if placeholder || self.has_service(name) {
            Ok(())
        } else {
            Err(format!("docker-compose.yml has no service {name}"))
        }
    }

    /// Names of the playground; those of compose are services.
    fn logs(&self, words: &[&str]) -> Result<(), String> {
        let [name] = words else { return Err("logs takes one name".into()) };
        // A person fills it in.
        let name = if *name == "NAME" { "mqtt-consumer" } else { name };
        if self.has_service(name) || ["agent-region1", "agent-region2"].contains(&name) {
            return Ok(());
        }
        Err(format!("nobody has a log {name}"))
    }
}

fn is_ours(word: &str) -> bool {
    let name = word.rsplit('/').next().unwrap_or(word);
    ["make", "tier0", "docker", "logs", "curl", "get", "sql"].contains(&name) || PROGRAMS.contains(&name)
}

fn collect(command: &clap::Command, options: &mut BTreeSet<String>) {
    options.extend(command.get_arguments().filter_map(|argument| argument.get_long()).map(str::to_owned));
    options.extend(["help".to_owned(), "version".to_owned()]);
    command.get_subcommands().for_each(|inner| collect(inner, options));
}

fn is_assignment(word: &str) -> bool {
    word.split_once('=').is_some_and(|(name, _)| {
        !name.is_empty() && name.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
    })
}

fn tier0(words: &[&str]) -> Result<(), String> {
    use clap::error::ErrorKind::{DisplayHelp, DisplayVersion, MissingRequiredArgument};
    let filled = words.iter().map(|word| if *word == "NAME" { "mqtt-consumer" } else { word });
    match Cli::try_parse_from(std::iter::once("tier0").chain(filled)).map_err(|error| (error.kind(), error)) {
        Ok(_) | Err((DisplayHelp | DisplayVersion, _)) => Ok(()),
        // The command as such is spoken of.
        Err((MissingRequiredArgument, _)) if words.len() == 1 => Ok(()),
        Err((_, error)) => Err(error.to_string()),
    }
}

/// Parsed by the program itself, which then prints what it would do and ends.
fn run(program: &str, words: &[&str]) -> Result<(), String> {
    let mut command = settings::command(program);
    command.current_dir(root());
    let print = (!words.contains(&"--print-config")).then_some("--print-config");
    let output = command.args(words).args(print).output().map_err(|error| error.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

fn request(words: &[&str], next: Option<&Vec<String>>) -> Result<Ask, String> {
    let (mut post, mut body, mut url) = (false, String::new(), None);
    let mut rest = words.iter();
    while let Some(word) = rest.next() {
        match *word {
            "-X" => post = rest.next() == Some(&"POST"),
            "-d" => body = rest.next().copied().unwrap_or_default().to_owned(),
            "-H" => drop(rest.next()),
            "-s" | "-sS" | "-f" => {}
            word if word.starts_with('-') => return Err(format!("curl {word}?")),
            word => url = Some(word),
        }
    }
    let url = url.ok_or("curl of nothing")?;
    let url = url.strip_prefix("http://").unwrap_or(url);
    let (host, path) = url.split_once('/').ok_or("no path")?;
    let (host, port) = host.split_once(':').ok_or("no port")?;
    if !["localhost", "127.0.0.1"].contains(&host) {
        return Err(format!("who is {host}?"));
    }
    // Any of our processes will do.
    let port = if port == "PORT" { "9101" } else { port };
    let port = port.parse().map_err(|_| format!("port {port}"))?;
    // jq '{a, b}' after it: the answer has these.
    let shown =
        next.filter(|words| words.first().is_some_and(|word| word == "jq")).and_then(|words| words.get(1));
    let keys = shown
        .and_then(|text| text.strip_prefix('{')?.strip_suffix('}'))
        .map(|list| list.split(',').map(|key| key.trim().to_owned()));
    let what =
        What::Http { post, port, path: format!("/{path}"), body, keys: keys.into_iter().flatten().collect() };
    Ok(Ask::new(what))
}

fn query(words: &[&str]) -> Result<Ask, String> {
    let [node @ ("primary" | "standby" | "region1" | "region2"), sql] = words else {
        return Err("sql NODE 'STATEMENT' is wanted".into());
    };
    Ok(Ask::new(What::Sql { node: (*node).to_owned(), sql: (*sql).to_owned() }))
}

#[test]
fn what_is_wrong_in_a_sentence_is_found() {
    let mut commands = Commands::load();
    for right in [
        "tier0 status",
        "make drill",
        "make up ARGS='--for 60s'",
        "mqtt-consumer --leave",
        "make sense?",
        "a 'b",
    ] {
        let found =
            if right == "make sense?" { commands.prose(right) } else { commands.span(right).map(drop) };
        assert!(found.is_ok(), "{right}: {found:?}");
    }
    for wrong in [
        "tier0 statsu",
        "tier0 status --no-such",
        "make no-such",
        "make up ARGS='--no-such'",
        "tier0 psql 'x",
        "mqtt-consumer --no-such",
    ] {
        assert!(commands.span(wrong).is_err(), "{wrong}");
    }
    for hidden in ["see tier0 status.", "with mqtt-consumer --leave", "by (make bench-growth)"] {
        assert!(commands.prose(hidden).is_err(), "{hidden}");
    }
}
