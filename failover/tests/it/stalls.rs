//! What keeps a failover waiting elsewhere: archivers, a WAL receiver that stands still, no free WAL sender, pauses.

use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use playground::postgres::Role;
use playground::shipped::postgres_bin;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::fixture::{Fixture, LIMIT, Setup, answered};
use crate::load::Load;

/// A backup that takes a WAL sender.
async fn archiver(fixture: &Fixture, number: usize) -> Child {
    let primary = fixture.cluster.primary();
    let directory = fixture.scratch.path().join(format!("archive{number}"));
    std::fs::create_dir(&directory).unwrap();
    let child = Command::new(postgres_bin().unwrap().join("pg_receivewal"))
        .args(["--host=127.0.0.1", "--no-password", "--no-loop", "--status-interval=1"])
        .arg(format!("--port={}", primary.port()))
        .arg(format!("--username={}", Role::Replicator.name()))
        .arg("--directory")
        .arg(&directory)
        .env("PGPASSWORD", primary.passwords().of(Role::Replicator))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let began = Instant::now();
    while senders(fixture, "pg_receivewal").await <= number as i64 {
        assert!(began.elapsed() < LIMIT, "the archiver does not stream");
        sleep(Duration::from_millis(20)).await;
    }
    child
}

/// An archiver that confirms nothing but the position that it began with, and answers all the time, until it is shut out.
async fn confirms_one_position(fixture: &Fixture) -> impl Future<Output = ()> + use<> {
    let primary = fixture.cluster.primary();
    let access = primary.data().join("pg_hba.conf");
    let rules = std::fs::read_to_string(&access).unwrap();
    std::fs::write(&access, format!("host replication all 127.0.0.1/32 trust\n{rules}")).unwrap();
    let db = fixture.admin("region1").await;
    db.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    let row = db.query_one(
        "SELECT pg_current_wal_flush_lsn()::text, (pg_current_wal_flush_lsn() - '0/0')::int8",
        &[],
    );
    let row = row.await.unwrap();
    let (text, position): (String, i64) = (row.get(0), row.get(1));
    let mut stream = loop {
        let mut stream = TcpStream::connect(("127.0.0.1", primary.port())).await.unwrap();
        let options =
            format!("user\0{}\0replication\0true\0application_name\0archiver\0\0", Role::Replicator.name());
        stream.write_i32(i32::try_from(options.len()).unwrap() + 8).await.unwrap();
        stream.write_i32(196_608).await.unwrap();
        stream.write_all(options.as_bytes()).await.unwrap();
        // `R`, its length and 0: it is let in. Before the rules are read again it is asked for a password.
        let mut answer = [0; 9];
        stream.read_exact(&mut answer).await.unwrap();
        if answer == [b'R', 0, 0, 0, 8, 0, 0, 0, 0] {
            break stream;
        }
        sleep(Duration::from_millis(50)).await;
    };
    let command = format!("START_REPLICATION PHYSICAL {text}\0");
    stream.write_u8(b'Q').await.unwrap();
    stream.write_i32(i32::try_from(command.len()).unwrap() + 4).await.unwrap();
    stream.write_all(command.as_bytes()).await.unwrap();
    let (mut reader, mut writer) = stream.into_split();
    async move {
        let drain = async { tokio::io::copy(&mut reader, &mut tokio::io::sink()).await };
        let answer = async {
            let mut reply = vec![b'd', 0, 0, 0, 38, b'r'];
            (0..3).for_each(|_| reply.extend(position.to_be_bytes()));
            reply.extend([0; 9]);
            while writer.write_all(&reply).await.is_ok() {
                sleep(Duration::from_millis(200)).await;
            }
        };
        tokio::select! { _ = drain => {}, () = answer => {} }
    }
}

async fn senders(fixture: &Fixture, name: &str) -> i64 {
    let sql = format!("SELECT count(*) FROM pg_stat_replication WHERE application_name = '{name}'");
    fixture.ask("region1", &sql).await
}

/// The process of `region` that receives WAL.
async fn receiver(fixture: &Fixture, region: &str) -> Pid {
    let seen = async || receiver_now(fixture, region).context("no WAL receiver");
    answered(region, seen).await
}

fn receiver_now(fixture: &Fixture, region: &str) -> Option<Pid> {
    let title = format!("{region}: walreceiver");
    std::fs::read_dir("/proc").unwrap().find_map(|entry| {
        let path = entry.unwrap().path();
        let title_of = std::fs::read(path.join("cmdline")).ok()?;
        let status = std::fs::read_to_string(path.join("status")).ok()?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()?;
        let ours = fixture.started(region) == Some(Pid::from_raw(parent));
        let number = path.file_name()?.to_str()?.parse().ok()?;
        (ours && String::from_utf8_lossy(&title_of).contains(&title)).then(|| Pid::from_raw(number))
    })
}

/// A fast stop waits until everybody who streams has confirmed the last bit, which an archiver never does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_archiver_that_keeps_answering_does_not_stop_a_switchover() {
    let fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    let mut confirmer = JoinSet::new();
    confirmer.spawn(confirms_one_position(&fixture).await);
    let began = Instant::now();
    let report = fixture.switch("region2").await;
    assert!(report.success, "{report:#?}");
    load.commits_after(Instant::now(), 10).await;
    println!("switched over in {:?}, {:?} without a commit", began.elapsed(), load.gap_since(began));
    assert_eq!(fixture.whole().await.current_region, "region2");
    // It was answered to the end.
    confirmer.join_next().await.unwrap().unwrap();
    load.finish().await;
}

/// Nobody can be detached from the primary that died: it is started where it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wal_receiver_that_stands_still_does_not_hold_the_writers_up() {
    let fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    let stopped = receiver(&fixture, "region2").await;
    kill(stopped, Signal::SIGSTOP).unwrap();
    fixture.kill_postmaster("region1");
    let killed = Instant::now();
    load.commits_after(killed, 10).await;
    println!("writes went on {:?} after the kill", killed.elapsed());
    assert!(killed.elapsed() < Duration::from_secs(60), "{:?}", killed.elapsed());
    // Replaced meanwhile, perhaps: then it is another process's number, or nobody's.
    if receiver_is(stopped) {
        kill(stopped, Signal::SIGCONT).unwrap();
    }
    fixture.whole().await;
    load.finish().await;
}

fn receiver_is(pid: Pid) -> bool {
    std::fs::read(format!("/proc/{pid}/cmdline"))
        .is_ok_and(|title| String::from_utf8_lossy(&title).contains("walreceiver"))
}

/// Backups have taken all WAL senders: the standby waits, says why, and its data stays what it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_free_wal_sender_costs_no_data() {
    let mut fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    let witness = fixture.cluster.nodes[1].data().join("a-file-of-the-old-data");
    std::fs::write(&witness, "").unwrap();
    fixture.kill_node("region2").await;
    let db = fixture.admin("region1").await;
    let sql = "SELECT current_setting('max_wal_senders')::int8";
    let most: i64 = db.query_one(sql, &[]).await.unwrap().get(0);
    // As many slots are allowed, and the standby has one: backups mostly have none.
    let began = Instant::now();
    while senders(&fixture, "region2").await > 0 {
        assert!(began.elapsed() < LIMIT, "the killed standby's sender stays");
        sleep(Duration::from_millis(20)).await;
    }
    let mut archivers = Vec::new();
    for number in 0..usize::try_from(most).unwrap() {
        archivers.push(archiver(&fixture, number).await);
    }
    fixture.restart_node("region2").await;
    fixture.until("said", |status| status.alarms.iter().any(|alarm| alarm.contains("max_wal_senders"))).await;
    assert!(witness.exists(), "nothing was copied");
    let said = Instant::now();
    load.commits_after(said, 10).await;
    drop(archivers);
    fixture.whole().await;
    println!("whole {:?} after the senders were free", said.elapsed());
    assert!(witness.exists(), "nothing was copied");
    load.finish().await;
}

/// The standby is cut off for a moment, somebody makes commits wait for nobody, and the primary dies: what it has acknowledged
/// alone is on its disk only.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_that_missed_commits_is_not_promoted_for_its_name() {
    let mut fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    fixture.agents[1].pause();
    let db = fixture.admin("region1").await;
    db.batch_execute("ALTER SYSTEM RESET ALL").await.unwrap();
    db.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    load.commits_after(Instant::now(), 10).await;
    fixture.kill_postmaster("region1");
    let killed = Instant::now();
    fixture.agents[1].resume();
    load.commits_after(killed, 10).await;
    println!("writes went on {:?} after the kill", killed.elapsed());
    fixture.whole().await;
    load.finish().await;
}

/// The orchestrator's machine stands still for a while: that others were not heard meanwhile says nothing about them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_of_the_orchestrator_is_nobody_elses_silence() {
    let mut fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    let before = fixture.whole().await;
    for _ in 0..3 {
        fixture.orchestrator.pause();
        sleep(Duration::from_secs(4)).await;
        fixture.orchestrator.resume();
        fixture.whole().await;
    }
    let after = fixture.whole().await;
    assert_eq!((after.current_region, after.epoch), (before.current_region, before.epoch));
    assert!(fixture.history().await.failovers.is_empty());
    load.finish().await;
}
