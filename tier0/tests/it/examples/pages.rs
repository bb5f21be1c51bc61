//! The pages, cut into blocks of code, spans of code and links.

use std::path::Path;

use tier0::docs::root;

pub(crate) struct Piece {
    pub(crate) line: usize,
    pub(crate) text: String,
}

pub(crate) struct Page {
    /// From the root.
    pub(crate) path: String,
    pub(crate) text: String,
    pub(crate) blocks: Vec<Piece>,
    pub(crate) spans: Vec<Piece>,
    /// What is between spans; one piece never reaches over one.
    pub(super) prose: Vec<Piece>,
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
    paths.iter().map(|path| Page::open(path)).collect()
}

impl Page {
    /// By its path from the root.
    pub(crate) fn open(path: &str) -> Self {
        Self::new(path.to_owned(), std::fs::read_to_string(root().join(path)).unwrap())
    }

    pub(crate) fn new(path: String, text: String) -> Self {
        let mut page =
            Self { path, text: String::new(), blocks: Vec::new(), spans: Vec::new(), prose: Vec::new() };
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
        let paragraphs = prose.chunk_by(|(line, text), (next, following)| {
            *next == line + 1 && !text.trim().is_empty() && !begins_anew(following)
        });
        for paragraph in paragraphs {
            match cut(paragraph) {
                Ok((spans, words)) => {
                    page.spans.extend(spans);
                    page.prose.extend(words);
                }
                Err(line) => panic!("{}:{line}: a backtick has no partner", page.path),
            }
        }
        page.text = text;
        page
    }

    /// Targets of links and pictures.
    pub(super) fn links(&self) -> impl Iterator<Item = String> {
        self.text.split("](").skip(1).filter_map(|rest| rest.split(')').next()).map(str::to_owned)
    }
}

/// Whether a line of a paragraph is none: a heading, a row of a table, an item of a list.
fn begins_anew(line: &str) -> bool {
    let line = line.trim_start();
    let number = line.trim_start_matches(|c: char| c.is_ascii_digit());
    line.is_empty()
        || ["#", "|", "- ", "* ", "> "].iter().any(|start| line.starts_with(start))
        || (number.len() < line.len() && number.starts_with(". "))
}

/// Spans of code and what is between them, both by the line they begin at. A span may go on in the next line. `Err` is
/// the line of a backtick that has no partner.
fn cut(paragraph: &[(usize, &str)]) -> Result<(Vec<Piece>, Vec<Piece>), usize> {
    let (mut spans, mut prose) = (Vec::new(), Vec::new());
    let mut open = false;
    let mut piece: Option<Piece> = None;
    for (line, text) in paragraph {
        for (number, part) in text.split('`').enumerate() {
            if number > 0 {
                if open { &mut spans } else { &mut prose }.extend(piece.take());
                open = !open;
            }
            match &mut piece {
                // Only at the beginning of a line.
                Some(piece) => {
                    piece.text.push(' ');
                    piece.text.push_str(part.trim_start());
                }
                None => piece = Some(Piece { line: *line, text: part.to_owned() }),
            }
        }
    }
    match (open, piece) {
        (true, piece) => Err(piece.map_or(0, |piece| piece.line)),
        (false, piece) => {
            prose.extend(piece);
            for span in &mut spans {
                span.text = span.text.replace("\\|", "|");
            }
            Ok((spans, prose))
        }
    }
}

#[test]
fn spans_are_found_where_they_are() {
    let page = Page::new(
        "x.md".into(),
        "# A `b`\n\nFor `tier0 status` and `make\n  drill` in\na sentence.\n1. `c d`\n2. e\n\n| `f \\| g` | h |\n\n    tier0 down\n"
            .into(),
    );
    let found = |pieces: &[Piece]| {
        pieces.iter().map(|piece| format!("{} {}", piece.line, piece.text)).collect::<Vec<_>>()
    };
    assert_eq!(found(&page.spans), ["1 b", "3 tier0 status", "3 make drill", "6 c d", "9 f | g"]);
    assert_eq!(found(&page.blocks), ["11 tier0 down\n"]);
    assert!(page.prose.iter().any(|piece| piece.text == " in a sentence."));
    assert!(cut(&[(7, "a `b"), (8, "c")]).is_err_and(|line| line == 7));
}
