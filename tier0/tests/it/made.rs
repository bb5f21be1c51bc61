//! Files made from the code are what `make docs` would make now, and complete.

use std::collections::BTreeSet;

use service::settings::SECTIONS;
use tier0::docs::{self, configuration, metrics};

#[tokio::test]
async fn made_files_are_current() {
    for (path, expected) in docs::files().unwrap() {
        let found = std::fs::read_to_string(docs::root().join(path)).unwrap_or_default();
        let differs = expected.lines().zip(found.lines()).position(|(expected, found)| expected != found);
        assert!(
            found == expected,
            "{path} is not what the code says (make docs), first at line {:?}",
            differs.map(|at| at + 1)
        );
    }
}

#[test]
fn every_section_of_every_process_is_in_the_reference() {
    let processes = configuration::processes();
    let page = configuration::page(&processes).unwrap();
    for section in SECTIONS {
        assert!(page.contains(&format!("### [{section}]\n")), "{section}");
    }
    let described: BTreeSet<&str> = processes.iter().map(|process| process.name).collect();
    let bins =
        ["consumers", "simulators", "failover"].map(|member| docs::root().join(member).join("src/bin"));
    let built: BTreeSet<String> = bins
        .iter()
        .flat_map(|dir| std::fs::read_dir(dir).unwrap())
        .map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    assert_eq!(built.iter().map(String::as_str).collect::<BTreeSet<_>>(), described);
}

#[tokio::test]
async fn every_series_says_what_it_is() {
    let registries = metrics::registries().unwrap();
    assert_eq!(registries.len(), configuration::processes().len());
    // Readers are found: a panel, an alert, a recorded series and what an alert reads by way of it.
    let page = metrics::page().unwrap();
    let line = |series: &str| page.lines().find(|line| line.starts_with(&format!("| `{series}` |"))).unwrap();
    assert!(line("ingest_rows_received_total").contains("`instance:ingest_residue_rows:now`"));
    assert!(line("instance:ingest_residue_rows:now").contains("alerts `ConservationResidue`"));
    assert!(line("ingest_end_to_end_seconds").contains("Pipeline: "));
    for (process, registry) in &registries {
        let series = registry.series();
        assert!(series.len() > 8, "{process}: {series:?}");
        for one in series {
            assert!(one.help.split_whitespace().count() > 1, "{process}: {} says {:?}", one.name, one.help);
            assert_eq!(
                one.kind == "counter",
                one.name.ends_with("_total"),
                "{process}: {} is a {}",
                one.name,
                one.kind
            );
            assert!(
                !one.labels.iter().any(|label| label.contains("device_id")),
                "{}: a label per device",
                one.name
            );
        }
    }
}
