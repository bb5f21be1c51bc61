//! Orders to a Postgres that is a script: what must never happen in between can be made to happen here.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::sys::stat::Mode;
use nix::unistd::{User, geteuid, mkfifo};
use service::secret::Secret;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;

use super::*;
use crate::agent::settings::RegionAgent;

const CONTROL: &str = "#!/bin/sh
cat <<END
Database system identifier:           7
Latest checkpoint location:           0/3000060
Latest checkpoint's TimeLineID:       1
Min recovery ending loc's timeline:   0
Database cluster state:               shut down
END
";

/// For what has to happen; as long as an order may take.
const SOON: Duration = Duration::from_secs(60);

fn script(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
}

/// A node with data, stopped. Its postmaster would say that it was started, in `started`.
async fn node(dir: &Path) -> Arc<Orders> {
    let (data, bin) = (dir.join("data"), dir.join("bin"));
    for dir in [&bin, &data.join("global"), &data.join("pg_wal")] {
        std::fs::create_dir_all(dir).unwrap();
    }
    std::fs::write(data.join("global/pg_control"), "").unwrap();
    script(&bin.join("pg_controldata"), CONTROL);
    let started = dir.join("started");
    script(
        &bin.join("postgres"),
        &format!("#!/bin/sh\ntrap '' HUP\necho $$ >> {}\nexec sleep 600\n", started.display()),
    );
    let settings = RegionAgent {
        data,
        bin,
        state: dir.join("state"),
        postgres_log: dir.join("log"),
        account: User::from_uid(geteuid()).unwrap().unwrap().name,
        replication_password: Secret::new("secret"),
        // Nobody listens there.
        port: 1,
        ..RegionAgent::default()
    };
    // A stop is an INT. Whoever started the tests in the background has switched it off, for children too; a process that handles
    // it, as the agent does, starts them with the default.
    drop(signal(SignalKind::interrupt()).unwrap());
    let node = Postgres::new(&settings, 1, TaskTracker::new()).unwrap();
    node.inspect().await.unwrap();
    let (shared, local) = (node.shared.clone(), Local::new(&settings, &node.shared));
    Arc::new(Orders::new(node, local.clone(), Arc::new(Ready::new(local, shared))))
}

fn command(epoch: u64, what: Order) -> Command {
    Command { orchestrator: "o".into(), displaces: Default::default(), epoch, limit_ms: 60_000, what }
}

fn lead() -> Order {
    Order::Promote { wait_for: Default::default(), slots: Default::default(), above: 0 }
}

/// Holds a start up where it opens Postgres' log: a pipe that nobody reads.
fn hold(dir: &Path) -> PathBuf {
    let log = dir.join("log");
    mkfifo(&log, Mode::S_IRWXU).unwrap();
    log
}

/// An order to lead that is held up right before its start: the role is written, after the last look at the order's number.
struct AboutToStart {
    orders: Arc<Orders>,
    log: PathBuf,
    leading: JoinSet<Result<NodeStatus, Refusal>>,
}

impl AboutToStart {
    async fn new(dir: &Path) -> Self {
        let orders = node(dir).await;
        let log = hold(dir);
        let (mut leading, leads) = (JoinSet::new(), orders.clone());
        leading.spawn(async move { leads.carry_out(command(1, lead())).await });
        let deadline = Instant::now() + SOON;
        while !dir.join("data/postgresql.auto.conf").exists() {
            assert!(Instant::now() < deadline, "no role is written");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Self { orders, log, leading }
    }
}

/// Lets it go on, and keeps the pipe open.
async fn release(log: PathBuf) -> std::fs::File {
    let open = move || std::fs::OpenOptions::new().read(true).write(true).open(log);
    tokio::task::spawn_blocking(open).await.unwrap().unwrap()
}

fn is_alive(pid: &str) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

async fn nothing_runs(dir: &Path, orders: &Orders) {
    let status = orders.status();
    assert!(matches!(status.postmaster, Postmaster::Stopped { settled: true, .. }), "{status:?}");
    let started = std::fs::read_to_string(dir.join("started")).unwrap_or_default();
    for pid in started.lines() {
        assert!(!is_alive(pid), "process {pid} runs though it was halted");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn halted_means_that_no_start_is_on_its_way() {
    let dir = tempfile::tempdir().unwrap();
    let AboutToStart { orders, log, mut leading } = AboutToStart::new(dir.path()).await;
    let halting = orders.clone();
    let mut halt =
        Box::pin(async move { halting.carry_out(command(1, Order::Halt { how: Stop::Fast })).await });
    let early = tokio::time::timeout(Duration::from_millis(200), &mut halt).await;
    assert!(early.is_err(), "answered while Postgres is being started: {early:?}");
    let _open = release(log).await;
    assert!(halt.await.unwrap().is_stopped());
    nothing_runs(dir.path(), &orders).await;
    let led = leading.join_next().await.unwrap().unwrap();
    assert!(
        matches!(led.as_ref().map_err(|refusal| refusal.code), Err(Code::Superseded | Code::Ended)),
        "{led:?}"
    );
    nothing_runs(dir.path(), &orders).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_agent_that_ends_starts_nothing_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let AboutToStart { orders, log, mut leading } = AboutToStart::new(dir.path()).await;
    let ending = orders.clone();
    let mut end = Box::pin(async move { ending.end(Instant::now() + SOON).await });
    let early = tokio::time::timeout(Duration::from_millis(200), &mut end).await;
    assert!(early.is_err(), "ended while Postgres is being started: {early:?}");
    let _open = release(log).await;
    end.await.unwrap();
    assert!(leading.join_next().await.unwrap().unwrap().is_err());
    for what in [lead(), Order::Detach] {
        assert_eq!(orders.carry_out(command(2, what)).await.unwrap_err().code, Code::Ending);
    }
    nothing_runs(dir.path(), &orders).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_halt_waits_for_nothing_when_nothing_else_is_at_work() {
    let dir = tempfile::tempdir().unwrap();
    let orders = node(dir.path()).await;
    let started = Instant::now();
    orders.carry_out(command(1, Order::Halt { how: Stop::Fast })).await.unwrap();
    // Whoever waits for something that does not come waits for the order's limit.
    assert!(started.elapsed() < SOON / 2, "{:?}", started.elapsed());
}

/// The epoch is accepted and the number given in one step: else the order of the lower epoch, held up in between, would
/// have the higher number and overtake the other.
#[tokio::test]
async fn an_older_epoch_never_gets_a_higher_number() {
    let dir = tempfile::tempdir().unwrap();
    let orders = node(dir.path()).await;
    let (entered, is_in) = std::sync::mpsc::sync_channel(1);
    let (go, wait) = std::sync::mpsc::sync_channel::<()>(1);
    let old = orders.clone();
    let held = std::thread::spawn(move || {
        old.node.accept(&command(5, Order::Detach), || {
            entered.send(()).unwrap();
            wait.recv().unwrap();
            old.next()
        })
    });
    is_in.recv().unwrap();
    let new = orders.clone();
    let (done, answer) = std::sync::mpsc::sync_channel(1);
    let newer = std::thread::spawn(move || {
        done.send(new.node.accept(&command(6, Order::Detach), || new.next())).unwrap()
    });
    let early = answer.recv_timeout(Duration::from_millis(200));
    assert!(early.is_err(), "a newer epoch came in between");
    go.send(()).unwrap();
    let low = held.join().unwrap().unwrap().unwrap();
    let high = answer.recv().unwrap().unwrap().unwrap();
    newer.join().unwrap();
    assert!(low < high, "{low} {high}");
    assert_eq!(orders.carry_out(command(5, Order::Detach)).await.unwrap_err().code, Code::OldEpoch);
}

/// A reload makes every process of Postgres read its configuration again; not twice in a failover.
#[tokio::test]
async fn postgres_is_told_its_role_once_and_again_when_that_did_not_come_through() {
    let dir = tempfile::tempdir().unwrap();
    let orders = node(dir.path()).await;
    let waits: BTreeSet<_> = ["b".to_owned()].into();
    let configure = |waits: Option<&BTreeSet<_>>| orders.node().configure(None, waits);
    assert!(!configure(None).unwrap(), "nobody is there to be told");
    orders.node().start_as_it_is(None).await.unwrap();
    let deadline = Instant::now() + SOON;
    while !dir.path().join("started").exists() {
        assert!(Instant::now() < deadline, "it does not start");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(!configure(None).unwrap(), "it has read it at its start");
    assert!(configure(Some(&waits)).unwrap());
    assert!(!configure(Some(&waits)).unwrap());
    // It cannot be written.
    let data = dir.path().join("data");
    std::fs::rename(&data, dir.path().join("away")).unwrap();
    assert!(configure(Some(&waits)).is_err());
    std::fs::rename(dir.path().join("away"), &data).unwrap();
    assert!(configure(Some(&waits)).unwrap(), "nobody knows what it was told");
    assert!(!configure(Some(&waits)).unwrap());
    // Nobody answers there, so nobody can say that the standbys are waited for.
    let what = Order::WaitFor { nodes: waits.clone() };
    assert!(orders.carry_out(command(1, what)).await.is_err());
    assert!(configure(Some(&waits)).unwrap(), "an order had no effect");
    assert!(!configure(Some(&waits)).unwrap());
    orders.end(Instant::now() + SOON).await.unwrap();
}
