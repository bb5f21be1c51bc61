//! The full-screen view. Draws what it is given; `q` and Ctrl-C count as a wish to end.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use crossterm::event::{Event, KeyCode, KeyModifiers, poll, read};
use ratatui::DefaultTerminal;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Paragraph, Row, Sparkline, Table};

use super::interrupt::Interrupts;
use super::plain::{lag, latency};
use super::sample::{Sample, Sampler};
use super::stack::Stack;

/// Owns the terminal; dropping it gives the terminal back.
#[derive(Debug)]
pub(super) struct Screen {
    terminal: DefaultTerminal,
    closed: Arc<AtomicBool>,
}

impl Screen {
    /// # Errors
    /// When the terminal cannot be switched or no thread can be started.
    pub(super) fn open(interrupts: Interrupts) -> anyhow::Result<Self> {
        let terminal = ratatui::try_init().context("open the terminal")?;
        let closed = Arc::new(AtomicBool::new(false));
        let screen = Self { terminal, closed: closed.clone() };
        // Raw mode turns Ctrl-C from a signal into a key.
        std::thread::Builder::new()
            .name("keyboard".into())
            .spawn(move || watch_keys(&closed, &interrupts))
            .context("start the keyboard's thread")?;
        Ok(screen)
    }

    pub(super) fn draw(&mut self, sampler: &Sampler, sample: &Sample, stack: &Stack) -> anyhow::Result<()> {
        let standby_wanted = stack.cluster.nodes.len() > 1;
        self.terminal
            .draw(|frame| paint(frame, sampler.history(), sample, standby_wanted))
            .context("draw")?;
        Ok(())
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Relaxed);
        ratatui::restore();
    }
}

fn watch_keys(closed: &AtomicBool, interrupts: &Interrupts) {
    while !closed.load(Ordering::Relaxed) {
        if !poll(Duration::from_millis(100)).unwrap_or(false) {
            continue;
        }
        if let Ok(Event::Key(key)) = read() {
            let control_c = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
            if control_c || key.code == KeyCode::Char('q') {
                interrupts.count_one();
            }
        }
    }
}

fn paint(frame: &mut Frame<'_>, history: &VecDeque<Sample>, sample: &Sample, standby_wanted: bool) {
    let [head, numbers, rate_chart, latency_chart, processes] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(10),
        Constraint::Min(4),
        Constraint::Min(4),
        Constraint::Length(11),
    ])
    .areas(frame.area());
    let title = format!(" Tier0   {:>4.0} s   q or Ctrl-C drains and verifies ", sample.seconds);
    frame.render_widget(Paragraph::new(title).bold().reversed(), head);

    let [flow, times, state] =
        Layout::horizontal([Constraint::Fill(1), Constraint::Fill(1), Constraint::Fill(1)]).areas(numbers);
    paint_flow(frame, flow, sample);
    paint_latency(frame, times, sample);
    paint_state(frame, state, sample, standby_wanted);

    let committed = history.iter().map(|sample| whole(sample.committed_rate));
    chart(frame, rate_chart, "rows committed per second", committed.collect(), Color::Green);
    let p99 = history.iter().map(|sample| whole(sample.p99.unwrap_or(0.0) * 1000.0));
    chart(frame, latency_chart, "device to commit, p99, ms", p99.collect(), Color::Yellow);

    let rows = sample.processes.iter().map(|process| {
        Row::new([
            process.name.clone(),
            format!("127.0.0.1:{}", process.port),
            format!("{:>4.0} %", process.cores * 100.0),
            format!("{:>6} MB", process.rss_bytes / 1_000_000),
        ])
    });
    let widths =
        [Constraint::Length(20), Constraint::Length(18), Constraint::Length(8), Constraint::Length(10)];
    let table = Table::new(rows, widths)
        .header(Row::new(["process", "address", "  core", "   memory"]).bold())
        .block(Block::bordered());
    frame.render_widget(table, processes);
}

fn paint_flow(frame: &mut Frame<'_>, area: Rect, sample: &Sample) {
    let lines = vec![
        pair("sent", format!("{:.0}/s", sample.sent_rate)),
        pair("messages in", format!("{:.0}/s", sample.received_rate)),
        pair("rows committed", format!("{:.0}/s", sample.committed_rate)),
        pair("acknowledged", sample.acknowledged.to_string()),
        pair("received", sample.received.to_string()),
        pair("stored", sample.committed.to_string()),
        warn("duplicates", sample.duplicates),
    ];
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(" flow ")), area);
}

fn paint_latency(frame: &mut Frame<'_>, area: Rect, sample: &Sample) {
    let lines = vec![
        pair("p50", latency(sample.p50)),
        pair("p95", latency(sample.p95)),
        pair("p99", latency(sample.p99)),
        pair("rows in a batch", format!("{:.0}", sample.batch_rows.unwrap_or(0.0))),
        pair("rows in flight", sample.rows_in_flight.to_string()),
        pair("queued", sample.queue_messages.to_string()),
        pair("unacknowledged", sample.publisher_in_flight.to_string()),
    ];
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(" device to commit ")), area);
}

fn paint_state(frame: &mut Frame<'_>, area: Rect, sample: &Sample, standby_wanted: bool) {
    let standby = match (standby_wanted, sample.flush_lag_bytes, sample.synchronous) {
        (false, _, _) => Span::from("none wanted"),
        (true, None, _) => Span::from("NOT ATTACHED").red().bold(),
        (true, Some(_), false) => Span::from("attached, not synchronous").yellow(),
        (true, Some(_), true) => Span::from("synchronous").green(),
    };
    let mut lines = vec![
        Line::from(vec![label("standby"), standby]),
        pair("not flushed there", lag(sample.flush_lag_bytes)),
        pair("not replayed there", lag(sample.replay_lag_bytes)),
        pair("user activity", sample.session_rate.map_or_else(|| "-".into(), |rate| format!("{rate:.0}/s"))),
        warn("retries", sample.retries),
    ];
    if sample.behind_seconds >= 1.0 {
        let text = format!("{:.0} s behind its schedule", sample.behind_seconds);
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

fn label(name: &str) -> Span<'static> {
    Span::from(format!("{name:<20}")).dim()
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a bar of a chart")]
fn whole(value: f64) -> u64 {
    value.max(0.0).round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::up::sample::Usage;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn painted(sample: &Sample, standby_wanted: bool, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        let history = [sample.clone(), sample.clone()].into();
        terminal.draw(|frame| paint(frame, &history, sample, standby_wanted)).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn an_operator_sees_flow_latency_lag_and_trouble() {
        let sample = Sample {
            seconds: 12.0,
            committed_rate: 19_987.4,
            p99: Some(0.095),
            replay_lag_bytes: Some(4096),
            flush_lag_bytes: Some(0),
            synchronous: true,
            dead_letters: [("not_json".to_owned(), 7)].into(),
            behind_seconds: 3.0,
            processes: vec![Usage {
                name: "mqtt-consumer".into(),
                port: 9101,
                cores: 0.25,
                rss_bytes: 42_000_000,
            }],
            ..Sample::default()
        };
        let text = painted(&sample, true, 120, 36);
        for words in [
            "19987/s",
            "95 ms",
            "synchronous",
            "4096 B",
            "not_json            7",
            "3 s behind",
            "rows committed per second: 19987 (highest 19987)",
            "mqtt-consumer       127.0.0.1:9101      25 %",
            "42 MB",
        ] {
            let squeezed = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(squeezed(&text).contains(&squeezed(words)), "{words} is not in\n{text}");
        }
        let detached = Sample { flush_lag_bytes: None, ..sample.clone() };
        assert!(painted(&detached, true, 120, 36).contains("NOT ATTACHED"));
        assert!(painted(&detached, false, 120, 36).contains("none wanted"));
        // A tiny terminal shows less and breaks nothing.
        painted(&sample, true, 20, 5);
    }
}
