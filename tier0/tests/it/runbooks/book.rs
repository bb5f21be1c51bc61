//! A runbook page, cut into what it tells people to type, in its order.
//!
//! Every piece of code in "Diagnosis" and "Mitigation" that has more than one word is a command to be carried out, unless it is
//! excused with a reason. What is neither carried out nor excused fails the test.

use crate::examples::pages::{Page, Piece};

/// A piece that is not carried out: how it begins, and why not.
pub(super) type Excuse = (&'static str, &'static str);

/// One page, while somebody follows it.
pub(super) struct Book {
    page: Page,
    steps: Vec<Step>,
}

struct Step {
    /// "Diagnosis"; "Mitigation" for what comes before the first number; "Mitigation 2"; or the heading below "Mitigation" that it is under.
    part: String,
    line: usize,
    text: String,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Open,
    Done,
    Excused,
}

impl Book {
    /// A page of `docs/runbooks/`.
    pub(super) fn open(name: &str, excuses: &[Excuse]) -> Self {
        Self::of(Page::open(&format!("docs/runbooks/{name}.md")), excuses)
    }

    fn of(page: Page, excuses: &[Excuse]) -> Self {
        let mut steps: Vec<Step> =
            page.blocks.iter().chain(&page.spans).filter_map(|piece| Step::new(&page, piece)).collect();
        steps.sort_by_key(|step| step.line);
        for (start, why) in excuses {
            let excused = steps.iter_mut().filter(|step| step.text.starts_with(start));
            let count = excused.map(|step| step.state = State::Excused).count();
            assert!(count > 0, "{}: nothing begins with {start:?}, which is excused: {why}", page.path);
        }
        Self { page, steps }
    }

    /// What a part tells people to type.
    pub(super) fn take(&mut self, part: &str) -> Vec<String> {
        let path = &self.page.path;
        let found: Vec<String> = self
            .steps
            .iter_mut()
            .filter(|step| step.part == part && step.state != State::Excused)
            .map(|step| {
                step.state = State::Done;
                step.text.clone()
            })
            .collect();
        assert!(!found.is_empty(), "{path} has no command under {part:?}");
        found
    }

    /// The page says so, word for word; the test looks whether it holds.
    pub(super) fn is_over_when(&self, words: &str) {
        let (_, rest) = self.page.text.split_once("\n## Resolved when\n").unwrap();
        let said = rest.split("\n## ").next().unwrap();
        let plain = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(plain(said), plain(words), "{}: the test looks at something else", self.page.path);
    }

    /// Everything was carried out or is excused.
    pub(super) fn close(self) {
        let left: Vec<String> = self
            .steps
            .iter()
            .filter(|step| step.state == State::Open)
            .map(|step| format!("{}:{} ({}): {}", self.page.path, step.line, step.part, step.text))
            .collect();
        assert!(left.is_empty(), "nobody has followed:\n  {}", left.join("\n  "));
    }
}

impl Step {
    fn new(page: &Page, piece: &Piece) -> Option<Self> {
        let part = part(&page.text, piece.line)?;
        let text = piece.text.trim().to_owned();
        let is_command = text.contains(char::is_whitespace);
        is_command.then_some(Self { part, line: piece.line, text, state: State::Open })
    }
}

/// Where a line stands, when that is in "Diagnosis" or "Mitigation".
fn part(text: &str, line: usize) -> Option<String> {
    let (mut section, mut below) = (String::new(), None);
    for line in text.lines().take(line) {
        let number = line.split_once(". ").map(|(number, _)| number);
        if let Some(heading) = line.strip_prefix("## ") {
            (section, below) = (heading.to_owned(), None);
        } else if let Some(heading) = line.strip_prefix("### ") {
            below = Some(heading.to_owned());
        } else if let Some(number) = number.filter(|number| number.parse::<u8>().is_ok()) {
            below = Some(format!("{section} {number}"));
        }
    }
    ["Diagnosis", "Mitigation"].contains(&section.as_str()).then(|| below.unwrap_or(section))
}

#[cfg(test)]
const SAMPLE: &str = "# A page\n\n## Diagnosis\n\n    curl x\n    logs y\n\n## Mitigation\n\nFirst `a b`.\n\n1. Either `c` or `d e`:\n\n       f g\n\n\
                      2. `h i`\n\n### More\n\n`j k`\n\n## Resolved when\n\n`l m` is\n1.\n\n## Impact\n";

#[test]
fn a_page_is_cut_into_its_parts() {
    let page = || Page::new("x.md".into(), SAMPLE.into());
    let mut book = Book::of(page(), &[("h i", "not here")]);
    let parts = ["Diagnosis", "Mitigation", "Mitigation 1", "More"].map(|part| book.take(part).join(" / "));
    assert_eq!(parts, ["curl x\nlogs y", "a b", "d e / f g", "j k"]);
    book.is_over_when("`l m` is 1.");
    book.close();
    let skipped = std::panic::catch_unwind(|| {
        let mut book = Book::of(page(), &[("h i", "not here")]);
        book.take("Mitigation 1");
        book.close();
    });
    assert!(skipped.is_err(), "what nobody has followed is said");
    assert!(std::panic::catch_unwind(|| Book::of(page(), &[("not there", "")])).is_err());
}
