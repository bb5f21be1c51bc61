//! Names that pages mention: settings, variables, series, paths, links.

use std::collections::BTreeSet;

use service::settings::SECTIONS;
use tier0::docs::configuration::{Section, processes};
use tier0::docs::{metrics, root};

use super::pages::Page;

/// Where paths of ours begin.
const TOP: [&str; 12] = [
    ".ci/",
    "config/",
    "consumers/",
    "crates/",
    "docs/",
    "failover/",
    "fuzz/",
    "grafana/",
    "ingest/",
    "playground/",
    "simulators/",
    "tier0/",
];
const OUR_SERIES: [&str; 4] = ["ingest_", "failover_", "region_agent_", "traces_"];

pub(super) struct Names {
    keys: BTreeSet<String>,
    sections: BTreeSet<String>,
    secrets: BTreeSet<String>,
    series: BTreeSet<String>,
    /// Everything that is no page, for variables of scripts and containers.
    rest: String,
}

fn collect(section: &Section, names: &mut Names) {
    names.sections.insert(section.name.clone());
    for key in &section.keys {
        let path = format!("{}.{}", section.name, key.name);
        if key.is_secret() {
            names.secrets.insert(path.clone());
        }
        names.keys.insert(path);
    }
    section.inner.iter().for_each(|inner| collect(inner, names));
}

impl Names {
    pub(super) fn load() -> Self {
        let mut names = Self {
            keys: BTreeSet::new(),
            sections: BTreeSet::new(),
            secrets: BTreeSet::new(),
            series: BTreeSet::new(),
            rest: String::new(),
        };
        processes()
            .iter()
            .flat_map(|process| &process.sections)
            .for_each(|section| collect(section, &mut names));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let registries = runtime.block_on(async { metrics::registries().unwrap() });
        names.series =
            registries.iter().flat_map(|(_, registry)| registry.series()).map(|series| series.name).collect();
        for dir in [
            "",
            "config",
            "config/compose",
            "grafana/provisioning/datasources",
            "playground/src",
            "tier0/src",
            "tier0/src/drill",
            "crates/service/src",
            ".ci",
        ] {
            for entry in std::fs::read_dir(root().join(dir)).unwrap() {
                let path = entry.unwrap().path();
                if path.is_file()
                    && path.extension().is_none_or(|extension| extension != "md" && extension != "lock")
                {
                    names.rest.push_str(&std::fs::read_to_string(&path).unwrap_or_default());
                }
            }
        }
        names
    }

    pub(super) fn span(&self, text: &str) -> Result<(), String> {
        for word in text.split(|c: char| c.is_whitespace() || "\"'()=,;".contains(c)) {
            self.word(word.trim_end_matches(['.', ':']))?;
        }
        Ok(())
    }

    fn word(&self, word: &str) -> Result<(), String> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == '.';
        let missing = |what: &str| Err(format!("there is no {what} {word}"));
        if let Some(name) = word.strip_prefix("TIER0__") {
            let path = name.to_lowercase().replace("__", ".");
            let of_file = path.strip_suffix("_file").is_some_and(|path| self.secrets.contains(path));
            let placeholder = path == "section.key" || path.contains("..");
            return if placeholder || of_file || self.keys.contains(&path) {
                Ok(())
            } else {
                missing("setting")
            };
        }
        if word.starts_with("TIER0_")
            && word.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
        {
            return if self.rest.contains(word) { Ok(()) } else { missing("variable") };
        }
        let first = word.split('.').next().unwrap_or_default();
        let is_file = [".rs", ".toml", ".md", ".json", ".sql", ".yml", ".conf", ".sh", ".py"]
            .iter()
            .any(|end| word.ends_with(end));
        if word.contains('.') && word.chars().all(plain) && SECTIONS.contains(&first) && !is_file {
            return if self.keys.contains(word) || self.sections.contains(word) {
                Ok(())
            } else {
                missing("setting")
            };
        }
        let series =
            ["_bucket", "_sum", "_count"].iter().find_map(|end| word.strip_suffix(end)).unwrap_or(word);
        let ours = OUR_SERIES.iter().any(|start| word.starts_with(start) && word.len() > start.len());
        if ours && word.chars().all(plain) && !word.ends_with('_') && word.contains('_') {
            return if [word, series].iter().any(|name| self.series.contains(*name)) {
                Ok(())
            } else {
                missing("series")
            };
        }
        // An MQTT topic, not a folder: where `mqtt-consumer --leave` publishes its marker.
        let topic = word.starts_with("tier0/leave/");
        let path =
            !topic && TOP.iter().any(|top| word.starts_with(top)) && !word.contains(['*', '{', '$', '<']);
        if path && !root().join(word).exists() {
            return missing("file");
        }
        Ok(())
    }

    /// A link leads somewhere: to a file, and to a heading when it names one.
    pub(super) fn link(&self, page: &Page, link: &str) -> Result<(), String> {
        if link.starts_with("http://") || link.starts_with("https://") {
            return Ok(());
        }
        let (file, heading) =
            link.split_once('#').map_or((link, None), |(file, heading)| (file, Some(heading)));
        let from = root().join(&page.path);
        let target = if file.is_empty() { from } else { from.parent().unwrap().join(file) };
        if !target.exists() {
            return Err(format!("{}: the link {link} leads nowhere", page.path));
        }
        let Some(heading) = heading else { return Ok(()) };
        let text = std::fs::read_to_string(&target).unwrap();
        let mut headings = text
            .lines()
            .filter_map(|line| line.strip_prefix('#'))
            .map(|line| anchor(line.trim_start_matches('#').trim()));
        if headings.any(|found| found == heading) {
            Ok(())
        } else {
            Err(format!("{}: no heading for {link}", page.path))
        }
    }
}

/// As GitHub makes it.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}
