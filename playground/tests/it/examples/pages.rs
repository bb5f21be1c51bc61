//! The pages, cut into blocks of code, spans of code and links.

use std::path::Path;

use playground::docs::root;

pub(super) struct Piece {
    pub(super) line: usize,
    pub(super) text: String,
}

pub(super) struct Page {
    /// From the root.
    pub(super) path: String,
    pub(super) text: String,
    pub(super) blocks: Vec<Piece>,
    pub(super) spans: Vec<Piece>,
}

pub(super) fn all() -> Vec<Page> {
    let mut paths: Vec<String> =
        ["README.md", "ARCHITECTURE.md", "SECURITY.md", "CHANGELOG.md", "grafana/README.md"]
            .map(str::to_owned)
            .into();
    for dir in ["docs", "docs/runbooks", "docs/decisions"] {
        let entries = std::fs::read_dir(root().join(dir)).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        paths.extend(
            names
                .filter(|name| Path::new(name).extension().is_some_and(|e| e == "md"))
                .map(|n| format!("{dir}/{n}")),
        );
    }
    paths.sort();
    assert!(paths.len() > 40, "{paths:?}");
    paths
        .into_iter()
        .map(|path| Page::new(path.clone(), std::fs::read_to_string(root().join(path)).unwrap()))
        .collect()
}

impl Page {
    fn new(path: String, text: String) -> Self {
        let mut page = Self { path, text: String::new(), blocks: Vec::new(), spans: Vec::new() };
        let (mut open, mut fenced, mut blank): (Option<Piece>, bool, bool) = (None, false, true);
        let mut prose: Vec<(usize, &str)> = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            if line.trim_start().starts_with("```") {
                match fenced {
                    true => page.blocks.extend(open.take()),
                    false => open = Some(Piece { line: number, text: String::new() }),
                }
                fenced = !fenced;
                continue;
            }
            let indented = line.starts_with("    ");
            match &mut open {
                Some(block) if fenced || indented => {
                    block.text.push_str(line.trim_start());
                    block.text.push('\n');
                }
                None if indented && blank => {
                    open = Some(Piece { line: number, text: format!("{}\n", line.trim_start()) });
                }
                _ => {
                    page.blocks.extend(open.take());
                    prose.push((number, line));
                }
            }
            blank = line.trim().is_empty();
        }
        page.blocks.extend(open);
        assert!(!fenced, "{}: a fence is open", page.path);
        for (line, text) in prose {
            let spans = text.split('`').skip(1).step_by(2);
            page.spans.extend(spans.map(|text| Piece { line, text: text.replace("\\|", "|") }));
        }
        page.text = text;
        page
    }

    /// Targets of links and pictures.
    pub(super) fn links(&self) -> impl Iterator<Item = String> {
        self.text.split("](").skip(1).filter_map(|rest| rest.split(')').next()).map(str::to_owned)
    }
}
