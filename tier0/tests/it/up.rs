//! The command as an operator uses it, with the real programs.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use playground::process::Process;
use playground::scratch::Scratch;
use serde_json::Value;
use tier0::home::Home;
use wire::ledger::Ledger;

/// 2,000 messages a second: enough to see batches, few enough for a machine that runs other tests. User activity is
/// there where a test is about it: an Erlang machine takes long to start.
const FLEET: [&str; 8] = [
    "--devices",
    "2000",
    "--interval",
    "1s",
    // With it goes what needs it.
    "--without",
    "rabbitmq",
    "--without",
    "monitoring",
];
const WITH_SESSIONS: [&str; 6] = ["--devices", "2000", "--interval", "1s", "--without", "monitoring"];

/// For what has to happen.
const PATIENCE: Duration = Duration::from_secs(120);

struct Tier0 {
    scratch: Scratch,
}

impl Tier0 {
    fn new() -> Self {
        Self { scratch: Scratch::new().unwrap() }
    }

    fn dir(&self) -> PathBuf {
        self.scratch.path().join(".tier0")
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tier0"));
        command.arg("--dir").arg(self.dir()).args(args).stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> (Output, String) {
        let output = self.command(args).output().unwrap();
        let text =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        (output, text)
    }

    /// Starts `up` and returns when rows are committed.
    fn up(&self, args: &[&str]) -> Running {
        self.up_with(&[&FLEET[..], args].concat())
    }

    fn up_with(&self, args: &[&str]) -> Running {
        let mut child = self.command(&[&["up"], args].concat()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let mut running = Running { child, lines: Box::new(lines) };
        running.until("first row committed");
        running
    }

    fn processes(&self) -> Vec<Process> {
        let processes = Home::open(&self.dir()).unwrap().state().unwrap().processes;
        for name in ["region1", "region2", "orchestrator", "mosquitto", "mqtt-consumer", "device-simulator"] {
            assert!(processes.iter().any(|process| process.name.ends_with(name)), "no {name}: {processes:?}");
        }
        processes
    }

    fn summary(&self) -> Value {
        serde_json::from_slice(&std::fs::read(self.scratch.path().join("summary.json")).unwrap()).unwrap()
    }
}

struct Running {
    child: Child,
    lines: Box<dyn Iterator<Item = String>>,
}

impl Running {
    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    fn until(&mut self, words: &str) {
        let seen: Vec<String> = self.lines.by_ref().take_while(|line| !line.contains(words)).collect();
        // At the end of the output the process has ended.
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("up ended ({status}) before it said {words:?}:\n{}", seen.join("\n"));
        }
    }

    /// The rest of its output and its exit status.
    fn end(mut self) -> (Option<i32>, String) {
        let text = self.lines.by_ref().collect::<Vec<_>>().join("\n");
        (self.child.wait().unwrap().code(), text)
    }
}

fn wait_gone(processes: &[Process]) {
    let deadline = Instant::now() + PATIENCE;
    while let Some(process) = processes.iter().find(|process| process.lives()) {
        assert!(Instant::now() < deadline, "{} (pid {}) still lives", process.name, process.pid);
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn every_acknowledged_reading_is_stored_once_on_both_nodes() {
    let tier0 = Tier0::new();
    let summary = tier0.scratch.path().join("summary.json");
    let run = |args: &[&str]| {
        let summary = ["--summary", summary.to_str().unwrap()];
        tier0.run(&[&["up", "--for", "5s"], &FLEET[..], &summary, args].concat())
    };
    // Twice on the same data: the second run is checked apart from the first.
    for seed in ["1", "2"] {
        let (output, text) = run(&["--seed", seed]);
        assert!(output.status.success(), "{text}");
        let summary = tier0.summary();
        assert_eq!(summary["verdict"], "exact", "{text}");
        let acknowledged = summary["acknowledged"].as_u64().unwrap();
        assert!(acknowledged > 1000, "{text}");
        for key in ["readings", "stored_primary", "stored_standby", "distinct"] {
            assert_eq!(summary[key], acknowledged, "{key}\n{text}");
        }
        assert_eq!(summary["dead_letters"], 0);
        assert!(summary["p99_ms"].as_f64().unwrap() < 30_000.0, "{text}");
        assert!(summary["start_seconds"].as_f64().unwrap() > 0.0, "{text}");
    }

    // With trouble, on empty tables.
    let trouble = [
        "--fresh",
        "--",
        "--trouble",
        "not_json=0.01",
        "--trouble",
        "nul_character=0.01",
        "--trouble",
        "duplicate=0.02",
        "--trouble",
        "late=0.02",
    ];
    let (output, text) = run(&trouble);
    assert!(output.status.success(), "{text}");
    let summary = tier0.summary();
    assert_eq!(summary["verdict"], "exact", "{text}");
    assert!(summary["dead_letters"].as_u64().unwrap() > 0, "{text}");
    assert!(summary["duplicates"].as_u64().unwrap() > 0, "{text}");
    for flaw in ["not_json", "nul_character", "duplicate", "late"] {
        assert!(summary["trouble"][flaw].as_u64().unwrap() > 0, "{flaw}: {text}");
    }
    assert_eq!(summary["trouble"]["not_json"], summary["dead_letters_by_reason"]["not_json"], "{text}");

    // Afterwards, on nodes started for the purpose; and a lost row is found.
    let (output, text) = tier0.run(&["verify"]);
    assert!(output.status.success() && text.contains("verdict: exact"), "{text}");
    let delete = "DELETE FROM device_telemetry WHERE (timestamp_utc, device_id) IN \
                  (SELECT timestamp_utc, device_id FROM device_telemetry OFFSET 100 LIMIT 1)";
    let (output, text) = tier0.run(&["psql", "primary", "--", "-Atc", delete]);
    assert!(output.status.success() && text.contains("DELETE 1"), "{text}");
    let (output, text) = tier0.run(&["verify", "--json"]);
    assert_eq!(output.status.code(), Some(1), "{text}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    for node in report["nodes"].as_array().unwrap() {
        assert_eq!((node["lost"].as_u64(), node["differing"].as_u64()), (Some(1), Some(1)), "{text}");
    }
}

#[test]
fn a_simulator_that_has_sent_its_count_ends_the_run() {
    let tier0 = Tier0::new();
    let summary = tier0.scratch.path().join("summary.json");
    let (output, text) =
        tier0.run(&["up", "--summary", summary.to_str().unwrap(), "--rate", "max", "--", "--count", "20000"]);
    assert!(output.status.success(), "{text}");
    let summary = tier0.summary();
    assert_eq!(
        (&summary["verdict"], summary["stored_standby"].as_u64()),
        (&"exact".into(), Some(20_000)),
        "{text}"
    );
}

#[test]
fn what_the_broker_holds_for_an_absent_consumer_is_stored_by_the_next_run() {
    let tier0 = Tier0::new();
    let run = |args: &[&str]| tier0.run(&[&["up", "--for", "2s"], &FLEET[..], args].concat());
    let (output, text) = run(&[]);
    assert!(output.status.success(), "{text}");
    let (output, text) = run(&["--without", "mqtt-consumer", "--seed", "2"]);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("lost"), "{text}");
    let (output, text) = run(&["--seed", "3"]);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("messages of an earlier run were still in the broker"), "{text}");
}

#[test]
fn nothing_survives_a_killed_parent() {
    let tier0 = Tier0::new();
    let running = tier0.up(&["--", "--set", "device_simulator.ledger_every=500ms"]);
    let servers = tier0.processes();
    // What was acknowledged up to some moment, and is stored on both nodes.
    let snapshot = tier0.scratch.path().join("snapshot.json");
    let ledger = Home::open(&tier0.dir()).unwrap().ledger();
    let deadline = Instant::now() + PATIENCE;
    // The first one may not be written yet.
    let has_readings =
        |bytes: &[u8]| serde_json::from_slice::<Ledger>(bytes).is_ok_and(|ledger| ledger.readings() > 0);
    while !std::fs::read(&ledger).is_ok_and(|bytes| has_readings(&bytes)) {
        assert!(Instant::now() < deadline, "no snapshot of the ledger has readings");
        std::thread::sleep(Duration::from_millis(20));
    }
    std::fs::copy(&ledger, &snapshot).unwrap();
    let verify = ["verify", "--ledger", snapshot.to_str().unwrap()];
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (output, text) = tier0.run(&verify);
        if output.status.success() {
            break;
        }
        // What the broker has acknowledged may still be on its way to the tables.
        assert!(Instant::now() < deadline, "{text}");
    }
    let mut all = servers.clone();
    for server in &servers {
        let below = playground::procfs::descendants(server.pid);
        all.extend(below.iter().map(|pid| Process::new("child", *pid, 0, std::path::Path::new(""))));
    }
    assert!(servers.iter().all(Process::lives));
    // A backend may have ended since it was seen.
    all.retain(Process::lives);
    assert!(all.len() > 15, "Postgres' own children are among them: {}", all.len());
    kill(running.pid(), Signal::SIGKILL).unwrap();
    running.end();
    wait_gone(&all);

    // And the data is as good as after a power cut of all of it: nothing that was stored is lost on either node (what
    // the broker had not handed on yet died with it), and the next run starts on it.
    let (output, text) = tier0.run(&verify);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("verdict: nothing lost (incomplete ledger)"), "{text}");
    let running = tier0.up(&["--seed", "2"]);
    kill(running.pid(), Signal::SIGINT).unwrap();
    let (status, text) = running.end();
    assert_eq!(status, Some(0), "{text}");
}

/// RabbitMQ with its port mapper and its helpers too.
#[test]
fn no_part_of_user_activity_survives_a_killed_parent() {
    let tier0 = Tier0::new();
    let mut running = tier0.up_with(&WITH_SESSIONS);
    // Listed from the moment it runs, long before the last part is up.
    running.until("  rabbitmq ");
    let deadline = Instant::now() + PATIENCE;
    while !tier0.processes().iter().any(|process| process.name == "rabbitmq") {
        assert!(Instant::now() < deadline, "not listed: {:?}", tier0.processes());
        std::thread::sleep(Duration::from_millis(20));
    }
    running.until("user-simulator");
    let process = |pid: &i32| Process::new(&command_of(*pid), *pid, 0, std::path::Path::new(""));
    let deadline = Instant::now() + PATIENCE;
    let all = loop {
        let below = playground::procfs::descendants(running.pid().as_raw());
        let all: Vec<Process> = below.iter().map(process).collect();
        let names = ["beam.smp", "epmd", "rabbitmq-consum", "user-simulator"];
        let missing = names.iter().find(|name| !all.iter().any(|process| process.name == **name));
        // A process has another name until it is the program that it was started as.
        let Some(missing) = missing else { break all };
        assert!(Instant::now() < deadline, "{missing} is not among {all:?}");
        std::thread::sleep(Duration::from_millis(20));
    };
    kill(running.pid(), Signal::SIGKILL).unwrap();
    running.end();
    wait_gone(&all);
}

/// As the kernel names it: the first 15 bytes.
fn command_of(pid: i32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

#[test]
fn user_activity_is_exact_and_verified_afterwards() {
    let tier0 = Tier0::new();
    let summary = tier0.scratch.path().join("summary.json");
    // Twice on the same data: a queue and a table that are there already.
    for seed in ["1", "2"] {
        let mut running = tier0.up_with(
            &[&WITH_SESSIONS[..], &["--seed", seed, "--summary", summary.to_str().unwrap()]].concat(),
        );
        running.until("user-simulator");
        // Two lines of the view: a second of activity.
        running.until("  sessions ");
        running.until("  sessions ");
        kill(running.pid(), Signal::SIGINT).unwrap();
        let (status, text) = running.end();
        assert_eq!(status, Some(0), "{text}");
        let summary = tier0.summary();
        assert_eq!(summary["verdict"], "exact", "{text}");
        assert!(summary["sessions"].as_u64().unwrap() > 0, "{text}");
        assert!(summary["session_messages"].as_u64() >= summary["sessions"].as_u64(), "{text}");
    }
    let (output, text) = tier0.run(&["verify"]);
    assert!(output.status.success() && text.contains("verdict: exact"), "{text}");
    let change = "UPDATE user_sessions SET last_activity = last_activity - interval '1us' WHERE session_id IN \
                  (SELECT session_id FROM user_sessions ORDER BY last_activity DESC LIMIT 1)";
    let (output, text) = tier0.run(&["psql", "primary", "--", "-Atc", change]);
    assert!(output.status.success() && text.contains("UPDATE 1"), "{text}");
    let (output, text) = tier0.run(&["verify"]);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("session"), "{text}");
}

#[test]
fn prometheus_watches_what_runs() {
    let tier0 = Tier0::new();
    let watched = &FLEET[..FLEET.len() - 2];
    let mut running = tier0.up_with(watched);
    running.until("/alerts");
    let processes = Home::open(&tier0.dir()).unwrap().state().unwrap().processes;
    let prometheus = processes.iter().find(|process| process.name == "prometheus").unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let path = "/api/v1/query?query=count%20by%20(job)%20(up%20%3D%3D%201)";
        let body = match runtime.block_on(playground::http::get(prometheus.port, path)) {
            Ok((200, body)) => body,
            other => format!("{other:?}"),
        };
        let missing: Vec<&str> =
            ["mqtt-consumer", "device-simulator", "postgres", "mosquitto", "node", "prometheus"]
                .into_iter()
                .filter(|job| !body.contains(&format!("\"job\":\"{job}\"")))
                .collect();
        if missing.is_empty() {
            break;
        }
        assert!(Instant::now() < deadline, "not up: {missing:?}: {body}");
        std::thread::sleep(Duration::from_millis(100));
    }
    kill(running.pid(), Signal::SIGINT).unwrap();
    let (status, text) = running.end();
    assert_eq!(status, Some(0), "{text}");
    wait_gone(&processes);
}

#[test]
fn status_down_and_a_second_up() {
    let tier0 = Tier0::new();
    let (output, text) = tier0.run(&["status"]);
    assert_eq!(output.status.code(), Some(3), "{text}");
    let running = tier0.up(&[]);
    let processes = tier0.processes();
    let (output, text) = tier0.run(&["up"]);
    assert!(!output.status.success() && text.contains("already up"), "{text}");
    // The simulator reports itself ready some time after its first messages.
    let deadline = Instant::now() + PATIENCE;
    let text = loop {
        let (output, text) = tier0.run(&["status"]);
        if output.status.success() {
            break text;
        }
        assert!(Instant::now() < deadline, "{text}");
    };
    assert!(text.contains("mqtt-consumer") && text.contains("ready"), "{text}");
    assert!(!text.contains("rabbitmq") && !text.contains("user-simulator"), "{text}");
    for (node, standby) in [("region2", "t"), ("standby", "t"), ("primary", "f")] {
        let (output, text) = tier0.run(&["psql", node, "--", "-Atc", "SELECT pg_is_in_recovery()"]);
        assert!(output.status.success() && text.trim() == standby, "{node}: {text}");
    }
    let (output, text) = tier0.run(&["logs", "mosquitto"]);
    assert!(output.status.success() && text.contains("mosquitto version"), "{text}");
    let (output, text) = tier0.run(&["down"]);
    assert!(output.status.success(), "{text}");
    wait_gone(&processes);
    let (status, text) = running.end();
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains("verdict") && text.contains("exact"), "{text}");
}

#[test]
fn a_start_is_seen_and_can_be_stopped() {
    let tier0 = Tier0::new();
    let mut up = tier0.command(&["up"]).stdout(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    let text = loop {
        let (output, text) = tier0.run(&["status"]);
        if output.status.code() != Some(3) {
            assert_eq!(output.status.code(), Some(1), "{text}");
            break text;
        }
        assert!(Instant::now() < deadline, "{text}");
    };
    assert!(text.contains("is starting"), "{text}");
    let (output, text) = tier0.run(&["down"]);
    assert!(output.status.success() && text.contains("still starting"), "{text}");
    assert_eq!(up.wait().unwrap().code(), Some(130));
    let (output, text) = tier0.run(&["status"]);
    assert_eq!(output.status.code(), Some(3), "{text}");
    // What was half made does not hinder the next start.
    let running = tier0.up(&[]);
    kill(running.pid(), Signal::SIGINT).unwrap();
    let (status, text) = running.end();
    assert_eq!(status, Some(0), "{text}");
}

#[test]
fn a_process_that_dies_ends_the_run_with_a_failure() {
    let tier0 = Tier0::new();
    let running = tier0.up(&[]);
    let processes = tier0.processes();
    let consumer = processes.iter().find(|process| process.name == "mqtt-consumer").unwrap();
    kill(Pid::from_raw(consumer.pid), Signal::SIGKILL).unwrap();
    let (status, text) = running.end();
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("FAILED: mqtt-consumer ended by itself"), "{text}");
    wait_gone(&processes);
}

#[test]
fn a_second_interrupt_aborts_at_once() {
    let tier0 = Tier0::new();
    let mut running = tier0.up(&[]);
    let processes = tier0.processes();
    // A consumer that cannot drain, so that the first interrupt alone would take long.
    let consumer = processes.iter().find(|process| process.name == "mqtt-consumer").unwrap();
    kill(Pid::from_raw(consumer.pid), Signal::SIGSTOP).unwrap();
    kill(running.pid(), Signal::SIGINT).unwrap();
    running.until("draining");
    kill(running.pid(), Signal::SIGINT).unwrap();
    let asked = Instant::now();
    let (status, text) = running.end();
    assert_eq!(status, Some(130), "{text}");
    // The consumer alone would be waited for for a minute.
    assert!(asked.elapsed() < Duration::from_secs(50), "{:?}", asked.elapsed());
    wait_gone(&processes);
}
