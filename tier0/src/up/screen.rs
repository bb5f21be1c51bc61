//! The full-screen view. Draws what it is given; `q` and Ctrl-C count as a wish to end.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context;
use crossterm::event::{Event, KeyCode, KeyModifiers, poll, read};
use ratatui::DefaultTerminal;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Paragraph, Sparkline};

use super::interrupt::Interrupts;
use super::plain::{lag, latency};
use super::regions::RegionsSeen;
use super::sample::{Sample, Sampler, Usage};
use super::stack::Stack;

/// Owns the terminal; dropping it gives the terminal back.
#[derive(Debug)]
pub(super) struct Screen {
    terminal: DefaultTerminal,
    keys: Arc<Keys>,
}

/// What the keyboard's thread tells.
#[derive(Debug, Default)]
struct Keys {
    closed: AtomicBool,
    /// Rows by which the processes are scrolled down.
    scrolled: AtomicUsize,
}

/// Everything that is shown.
struct Shown<'a> {
    history: &'a VecDeque<Sample>,
    sample: &'a Sample,
    standby_wanted: bool,
    events: &'a [String],
    scrolled: usize,
}

impl Screen {
    /// # Errors
    /// When the terminal cannot be switched or no thread can be started.
    pub(super) fn open(interrupts: Interrupts) -> anyhow::Result<Self> {
        let terminal = ratatui::try_init().context("open the terminal")?;
        let keys = Arc::new(Keys::default());
        let screen = Self { terminal, keys: keys.clone() };
        // Raw mode turns Ctrl-C from a signal into a key.
        std::thread::Builder::new()
            .name("keyboard".into())
            .spawn(move || watch_keys(&keys, &interrupts))
            .context("start the keyboard's thread")?;
        Ok(screen)
    }

    pub(super) fn draw(&mut self, sampler: &Sampler, sample: &Sample, stack: &Stack) -> anyhow::Result<()> {
        let shown = Shown {
            history: sampler.history(),
            sample,
            standby_wanted: stack.cluster.nodes.len() > 1,
            events: &stack.notices,
            scrolled: self.keys.scrolled.load(Ordering::Relaxed),
        };
        let mut rows_left = 0;
        self.terminal.draw(|frame| rows_left = paint(frame, &shown)).context("draw")?;
        // Scrolled no further than there is something to see.
        self.keys.scrolled.fetch_min(rows_left, Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.keys.closed.store(true, Ordering::Relaxed);
        ratatui::restore();
    }
}

fn watch_keys(keys: &Keys, interrupts: &Interrupts) {
    while !keys.closed.load(Ordering::Relaxed) {
        if !poll(Duration::from_millis(100)).unwrap_or(false) {
            continue;
        }
        let Ok(Event::Key(key)) = read() else { continue };
        match key.code {
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => interrupts.count_one(),
            KeyCode::Char('q') => interrupts.count_one(),
            KeyCode::Down => {
                keys.scrolled.fetch_add(1, Ordering::Relaxed);
            }
            KeyCode::Up => {
                let rows = keys.scrolled.load(Ordering::Relaxed);
                keys.scrolled.store(rows.saturating_sub(1), Ordering::Relaxed);
            }
            _ => {}
        }
    }
}

/// Draws it all; how many rows of processes could still be scrolled to in all.
fn paint(frame: &mut Frame<'_>, shown: &Shown<'_>) -> usize {
    let sample = shown.sample;
    let columns = usize::from((frame.area().width.saturating_sub(2) / COLUMN).max(1));
    let rows = sample.processes.len().div_ceil(columns);
    let wanted = u16::try_from(rows).unwrap_or(u16::MAX).saturating_add(3);
    let [head, numbers, told, charts, processes] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(9),
        Constraint::Length(6),
        Constraint::Fill(1),
        Constraint::Length(wanted.min(frame.area().height.saturating_sub(16))),
    ])
    .areas(frame.area());
    let title = format!(" Tier0   {:>4.0} s   q or Ctrl-C drains and verifies ", sample.seconds);
    frame.render_widget(Paragraph::new(title).bold().reversed(), head);

    let thirds = [Constraint::Fill(1), Constraint::Fill(1), Constraint::Fill(1)];
    let [flow, times, state] = Layout::horizontal(thirds).areas(numbers);
    paint_flow(frame, flow, sample);
    paint_latency(frame, times, sample);
    paint_state(frame, state, sample, shown.standby_wanted);

    let [regions, events] = Layout::horizontal([Constraint::Fill(1), Constraint::Fill(1)]).areas(told);
    paint_regions(frame, regions, sample.regions.as_ref(), shown.standby_wanted);
    paint_events(frame, events, shown.events);

    if charts.height >= 4 {
        let [rate_chart, latency_chart] = if charts.height >= 10 {
            Layout::vertical([Constraint::Fill(1), Constraint::Fill(1)]).areas(charts)
        } else {
            Layout::horizontal([Constraint::Fill(1), Constraint::Fill(1)]).areas(charts)
        };
        let committed = shown.history.iter().map(|sample| whole(sample.committed_rate));
        chart(frame, rate_chart, "rows/s", committed.collect(), Color::Green);
        let p99 = shown.history.iter().map(|sample| whole(sample.p99.unwrap_or(0.0) * 1000.0));
        chart(frame, latency_chart, "p99 ms", p99.collect(), Color::Yellow);
    }
    paint_processes(frame, processes, shown, columns)
}

/// At most [`NAME`] letters. Two names may differ in their end only.
fn shortened(name: &str) -> String {
    let letters = name.chars().count();
    if letters <= NAME {
        return name.to_owned();
    }
    let half = NAME / 2;
    let (start, end) = (name.chars().take(half), name.chars().skip(letters - half));
    start.chain(['…']).chain(end).collect()
}

const NAME: usize = 21;
/// Width of one process: name, port, processor, memory.
const COLUMN: u16 = 39;

/// In columns, the first ones from top to bottom; what does not fit is scrolled to.
fn paint_processes(frame: &mut Frame<'_>, area: Rect, shown: &Shown<'_>, columns: usize) -> usize {
    let all = &shown.sample.processes;
    let rows = all.len().div_ceil(columns);
    let fits = usize::from(area.height.saturating_sub(3));
    let left = rows.saturating_sub(fits);
    let first = shown.scrolled.min(left);
    let cell = |process: &Usage| {
        let name = shortened(&process.name);
        let memory = process.rss_bytes / 1_000_000;
        format!("{name:<21}{:>6}{:>4.0}%{memory:>4}MB ", process.port, process.cores * 100.0)
    };
    let heading = format!("{:<21}{:>6}{:>5}{:>6} ", "process", "port", "core", "mem");
    let mut lines = vec![Line::from(heading.repeat(columns.min(all.len().max(1)))).bold()];
    for row in first..(first + fits).min(rows) {
        let cells = (0..columns).filter_map(|column| all.get(column * rows + row));
        lines.push(Line::from(cells.map(cell).collect::<String>()));
    }
    let more = if left > 0 {
        format!(
            " {} processes, rows {} to {} of {rows}: arrow keys ",
            all.len(),
            first + 1,
            (first + fits).min(rows)
        )
    } else {
        format!(" {} processes ", all.len())
    };
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(more)), area);
    left
}

fn paint_regions(frame: &mut Frame<'_>, area: Rect, seen: Option<&RegionsSeen>, wanted: bool) {
    let lines = match seen {
        None if wanted => vec![Line::from("the orchestrator does not answer").red().bold()],
        None => vec![Line::from("one region, no failover")],
        Some(seen) => {
            let alive = seen.condition == "alive";
            let primary = Span::from(if alive {
                seen.primary.clone()
            } else {
                format!("{}: {}", seen.primary, seen.condition)
            });
            let copies = Span::from(seen.copies.to_string());
            let alarm = match seen.alarms.as_slice() {
                [] => Span::from("none").green(),
                [only] => Span::from(only.clone()).red().bold(),
                [first, rest @ ..] => Span::from(format!("({} more) {first}", rest.len())).red().bold(),
            };
            vec![
                Line::from(vec![
                    label("primary"),
                    if alive { primary.green() } else { primary.red().bold() },
                ]),
                Line::from(vec![
                    label("copies"),
                    if seen.copies > 1 { copies } else { copies.yellow().bold() },
                ]),
                pair("last failover", seen.last_failover.clone().unwrap_or_else(|| "none".into())),
                Line::from(vec![label("alarms"), alarm]),
            ]
        }
    };
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(" regions ")), area);
}

/// The newest last.
fn paint_events(frame: &mut Frame<'_>, area: Rect, events: &[String]) {
    let fits = usize::from(area.height.saturating_sub(2));
    let newest = events.get(events.len().saturating_sub(fits)..).unwrap_or_default();
    let lines: Vec<Line<'_>> = newest.iter().map(|event| Line::from(event.as_str())).collect();
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(" events ")), area);
}

fn paint_flow(frame: &mut Frame<'_>, area: Rect, sample: &Sample) {
    let lines = vec![
        pair("sent", format!("{:.0}/s", sample.sent_rate)),
        pair("messages in", format!("{:.0}/s", sample.received_rate)),
        pair("committed", format!("{:.0}/s", sample.committed_rate)),
        pair("acknowledged", sample.acknowledged.to_string()),
        pair("received", sample.received.to_string()),
        pair("stored", sample.committed.to_string()),
        warn("duplicates", sample.duplicates),
    ];
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(" flow ")), area);
}

fn paint_latency(frame: &mut Frame<'_>, area: Rect, sample: &Sample) {
    let lines = vec![
        pair("p50", latency(sample.p50).trim().to_owned()),
        pair("p95", latency(sample.p95).trim().to_owned()),
        pair("p99", latency(sample.p99).trim().to_owned()),
        pair("rows a batch", format!("{:.0}", sample.batch_rows.unwrap_or(0.0))),
        pair("rows in flight", sample.rows_in_flight.to_string()),
        pair("queued", sample.queue_messages.to_string()),
        pair("unacked", sample.publisher_in_flight.to_string()),
    ];
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(" device to commit ")), area);
}

fn paint_state(frame: &mut Frame<'_>, area: Rect, sample: &Sample, standby_wanted: bool) {
    let standby = match (standby_wanted, sample.flush_lag_bytes, sample.synchronous) {
        (false, _, _) => Span::from("none"),
        (true, None, _) => Span::from("DETACHED").red().bold(),
        (true, Some(_), false) => Span::from("not sync").yellow(),
        (true, Some(_), true) => Span::from("sync").green(),
    };
    let mut lines = vec![
        Line::from(vec![label("standby"), standby]),
        // Not flushed, and not replayed.
        pair(
            "lag",
            format!("{} / {}", lag(sample.flush_lag_bytes).trim(), lag(sample.replay_lag_bytes).trim()),
        ),
        pair("user activity", sample.session_rate.map_or_else(|| "-".into(), |rate| format!("{rate:.0}/s"))),
        warn("retries", sample.retries),
    ];
    if sample.behind_seconds >= 1.0 {
        let text = format!("{:.0} s late", sample.behind_seconds);
        lines.push(Line::from(vec![label("simulator"), Span::from(text).yellow()]));
    }
    lines.push(warn("dead letters", sample.dead_letters.values().sum()));
    for (reason, count) in &sample.dead_letters {
        lines.push(pair(&format!("  {reason}"), count.to_string()));
    }
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(" state ")), area);
}

/// The newest value is the last bar and stands in the title.
fn chart(frame: &mut Frame<'_>, area: Rect, title: &str, values: Vec<u64>, color: Color) {
    let fits = usize::from(area.width.saturating_sub(2));
    let shown = values.get(values.len().saturating_sub(fits)..).unwrap_or_default();
    let highest = shown.iter().max().copied().unwrap_or(0);
    let newest = shown.last().copied().unwrap_or(0);
    let title = format!(" {title}: {newest} (highest {highest}) ");
    let sparkline =
        Sparkline::default().block(Block::bordered().title(title)).data(shown).style(Style::new().fg(color));
    frame.render_widget(sparkline, area);
}

fn pair(name: &str, value: String) -> Line<'static> {
    Line::from(vec![label(name), Span::from(value)])
}

fn warn(name: &str, value: u64) -> Line<'static> {
    let value = Span::from(value.to_string());
    Line::from(vec![label(name), if value.content == "0" { value } else { value.yellow().bold() }])
}

/// Three boxes beside each other fit into 80 columns.
const LABEL: usize = 14;

fn label(name: &str) -> Span<'static> {
    Span::from(format!("{name:<LABEL$} ")).dim()
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a bar of a chart")]
fn whole(value: f64) -> u64 {
    value.max(0.0).round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn painted(
        sample: &Sample,
        standby_wanted: bool,
        events: &[String],
        (width, height): (u16, u16),
    ) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        let history = [sample.clone(), sample.clone()].into();
        let shown = Shown { history: &history, sample, standby_wanted, events, scrolled: 0 };
        terminal
            .draw(|frame| {
                paint(frame, &shown);
            })
            .unwrap();
        terminal.backend().to_string()
    }

    fn sample() -> Sample {
        let names = ["region1", "region2", "mqtt-consumer"].map(str::to_owned).into_iter();
        let processes = names.chain((4..=22).map(|number| format!("process-{number}")));
        Sample {
            seconds: 12.0,
            committed_rate: 19_987.4,
            acknowledged: 123_456_789,
            p99: Some(0.095),
            replay_lag_bytes: Some(4096),
            flush_lag_bytes: Some(0),
            synchronous: true,
            dead_letters: [("not_json".to_owned(), 7)].into(),
            behind_seconds: 3.0,
            regions: Some(RegionsSeen {
                primary: "region2".into(),
                condition: "alive".into(),
                copies: 2,
                last_failover: Some("unplanned to region2 4 s ago, write gap 190 ms".into()),
                alarms: vec!["ONE COPY: no standby".into(), "another".into()],
            }),
            processes: processes
                .map(|name| Usage { name, port: 26_381, cores: 0.25, rss_bytes: 42_000_000 })
                .collect(),
            ..Sample::default()
        }
    }

    #[test]
    fn long_names_keep_both_ends() {
        assert_eq!(shortened("failover-orchestrator"), "failover-orchestrator");
        assert_eq!(shortened("postgres-exporter-region1"), "postgres-e…er-region1");
    }

    #[test]
    fn an_operator_sees_flow_latency_lag_trouble_regions_and_events() {
        let events = ["    3 s  region-agent had ended".to_owned(), "    4 s  first dead letter".to_owned()];
        for size in [(80, 24), (120, 40), (200, 60)] {
            let text = painted(&sample(), true, &events, size);
            println!("{text}");
            for words in [
                "19987/s",
                "123456789",
                "95 ms",
                "0 B / 40",
                "not_json 7",
                "3 s late",
                "primary region2",
                "copies 2",
                "unplanned to region2",
                "(1 more) ONE COPY",
                "4 s first dead letter",
                "mqtt-consumer",
                "22 processes",
            ] {
                let squeezed = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
                assert!(squeezed(&text).contains(&squeezed(words)), "{words} is not in\n{text}");
            }
            // Every process is there, or how to see the others is.
            assert!(text.contains("process-22") || text.contains("arrow keys"), "{text}");
        }
        assert!(painted(&sample(), true, &[], (120, 40)).contains("process-22"), "all of them");
        let lonely = Sample { flush_lag_bytes: None, regions: None, ..sample() };
        let text = painted(&lonely, true, &[], (120, 40));
        assert!(text.contains("DETACHED") && text.contains("the orchestrator does not answer"), "{text}");
        assert!(painted(&lonely, false, &[], (120, 40)).contains("one region, no failover"));
        // A tiny terminal shows less and breaks nothing.
        painted(&sample(), true, &[], (20, 5));
    }
}
