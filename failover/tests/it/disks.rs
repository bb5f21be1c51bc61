//! Disks that are full, and one that hangs: `make drill-hand`, since they need a loop device.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tokio::time::Instant;

use crate::fixture::{Fixture, Setup};
use crate::load::Load;

/// A file system of its own for the data of one node.
struct Disk {
    at: PathBuf,
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Disk {
    /// Moves the data of a node there.
    async fn under(fixture: &mut Fixture, region: &str, megabytes: u64) -> Self {
        fixture.kill_node(region).await;
        let at = fixture.cluster.nodes[fixture.index(region)].data().to_owned();
        let (old, image) = (at.with_extension("old"), at.with_extension("image"));
        std::fs::rename(&at, &old).unwrap();
        std::fs::create_dir(&at).unwrap();
        std::fs::File::create(&image).unwrap().set_len(megabytes << 20).unwrap();
        let (path, text) = (|path: &Path| path.to_str().unwrap().to_owned(), at.to_str().unwrap());
        run("mkfs.ext4", &["-q", "-m", "0", &path(&image)]);
        run("mount", &["-o", "loop", &path(&image), text]);
        let disk = Self { at: at.clone() };
        std::fs::remove_dir(at.join("lost+found")).unwrap();
        run("cp", &["-a", &path(&old.join(".")), text]);
        std::fs::remove_dir_all(&old).unwrap();
        fixture.restart_node(region).await;
        fixture.whole().await;
        disk
    }

    fn freeze(&self, how: &str) {
        run("fsfreeze", &[how, self.at.to_str().unwrap()]);
    }

    /// Leaves nothing free.
    fn fill(&self) -> PathBuf {
        let filler = self.at.join("filler");
        let to = format!("of={}", filler.display());
        let output = Command::new("dd").args(["if=/dev/zero", "bs=4k", &to]).output().unwrap();
        assert!(String::from_utf8_lossy(&output.stderr).contains("No space left"), "{output:?}");
        filler
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Whatever a failed test left: nobody could end otherwise.
        drop(Command::new("fsfreeze").arg("-u").arg(&self.at).output());
        drop(Command::new("umount").arg("-l").arg(&self.at).output());
    }
}

fn says(status: &failover_api::Status, what: &str) -> bool {
    status.alarms.iter().any(|alarm| alarm.contains(what))
}

/// Postgres answers every question and commits nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a loop device: make drill-hand"]
async fn a_primary_whose_disk_hangs_is_replaced() {
    let mut fixture = Setup::default().start().await;
    let disk = Disk::under(&mut fixture, "region2", 1500).await;
    fixture.switch("region2").await;
    fixture.whole().await;
    let load = Load::start(&fixture.database()).await;
    disk.freeze("-f");
    let frozen = Instant::now();
    fixture.until("failed over", |status| status.current_region == "region1").await;
    load.commits_after(frozen + Duration::from_secs(1), 10).await;
    println!("writes went on {:?} after the disk stood still", frozen.elapsed());
    assert!(frozen.elapsed() < Duration::from_secs(30), "{:?}", frozen.elapsed());
    disk.freeze("-u");
    assert_eq!(fixture.whole().await.current_region, "region1");
    load.finish().await;
}

/// Writes fail, then Postgres ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a loop device: make drill-hand"]
async fn a_primary_whose_disk_is_full_is_replaced() {
    let mut fixture = Setup::default().start().await;
    let disk = Disk::under(&mut fixture, "region2", 1500).await;
    fixture.switch("region2").await;
    fixture.whole().await;
    let load = Load::start(&fixture.database()).await;
    let filler = disk.fill();
    let full = Instant::now();
    fixture.until("failed over", |status| status.current_region == "region1").await;
    load.commits_after(Instant::now(), 10).await;
    println!("writes went on {:?} after the disk was full", full.elapsed());
    std::fs::remove_file(filler).unwrap();
    assert_eq!(fixture.whole().await.current_region, "region1");
    load.finish().await;
}

/// It waits for room, says so, and keeps what it has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a loop device: make drill-hand"]
async fn a_standby_whose_disk_is_full_keeps_its_data() {
    let mut fixture = Setup::default().start().await;
    let disk = Disk::under(&mut fixture, "region2", 1500).await;
    let load = Load::start(&fixture.database()).await;
    let witness = fixture.cluster.nodes[1].data().join("a-file-of-the-old-data");
    std::fs::write(&witness, "").unwrap();
    let filler = disk.fill();
    fixture.until("said", |status| says(status, "No space left")).await;
    let said = Instant::now();
    load.commits_after(said, 10).await;
    assert!(witness.exists(), "nothing was copied");
    std::fs::remove_file(filler).unwrap();
    fixture.whole().await;
    println!("whole {:?} after there was room", said.elapsed());
    assert!(witness.exists(), "nothing was copied");
    load.finish().await;
}
