//! Charts of benchmarks as SVG documents. Draws what it is given; measures nothing.

use anyhow::anyhow;
use plotters::prelude::*;

use super::{Phase, Second, Step};

const SIZE: (u32, u32) = (960, 720);
const ARRAYS: RGBColor = RGBColor(31, 119, 180);
const SINGLES: RGBColor = RGBColor(214, 39, 40);
const MEDIAN: RGBColor = RGBColor(44, 160, 44);
const TAIL: RGBColor = RGBColor(148, 103, 189);

/// Rate above, latency below, over the rows in the table.
pub(super) fn growth(seconds: &[Second], steps: &[Step]) -> anyhow::Result<String> {
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        draw(&root, seconds, steps).map_err(|error| anyhow!("draw the chart: {error}"))?;
    }
    Ok(text)
}

fn whole(value: &f64) -> String {
    format!("{value:.0}")
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn draw<'a>(
    root: &Area<'a>,
    seconds: &[Second],
    steps: &[Step],
) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
    root.fill(&WHITE)?;
    let (above, below) = root.split_vertically(SIZE.1 / 2);
    let millions = |rows: u64| rows as f64 / 1e6;
    let width = seconds.iter().map(|s| millions(s.rows)).fold(0.1, f64::max);

    let top = seconds.iter().map(|s| s.rows_per_second).fold(1.0, f64::max) * 1.1;
    let mut rates = ChartBuilder::on(&above)
        .caption("Rows committed per second, both nodes, QoS 1", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d(0.0..width, 0.0..top)?;
    rates
        .configure_mesh()
        .x_desc("rows in the table, millions")
        .y_desc("rows/s")
        .y_label_formatter(&whole)
        .x_label_formatter(&whole)
        .light_line_style(WHITE)
        .draw()?;
    for (phase, colour, name) in
        [(Phase::Arrays, ARRAYS, "arrays of 100"), (Phase::Singles, SINGLES, "single readings")]
    {
        let points = seconds.iter().filter(|s| s.phase == phase);
        rates
            .draw_series(
                points.map(|s| {
                    Circle::new((millions(s.rows), s.rows_per_second), 2, colour.mix(0.35).filled())
                }),
            )?
            .label(name)
            .legend(move |(x, y)| Circle::new((x + 10, y), 3, colour.filled()));
    }
    let line = |of: fn(&Step) -> f64| steps.iter().map(|s| (millions(s.rows), of(s))).collect::<Vec<_>>();
    rates.draw_series(LineSeries::new(line(|s| s.arrays_rows_per_second), ARRAYS.stroke_width(2)))?;
    rates.draw_series(LineSeries::new(line(|s| s.singles_per_second), SINGLES.stroke_width(2)))?;
    rates.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.3)).draw()?;

    let live = || seconds.iter().filter(|s| s.phase == Phase::Live);
    let worst = live().filter_map(|s| s.p99_ms).fold(1.0, f64::max) * 1.1;
    let mut latency = ChartBuilder::on(&below)
        .caption("From timestamp to commit, single readings at the live rate", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d(0.0..width, 0.0..worst)?;
    latency
        .configure_mesh()
        .x_desc("rows in the table, millions")
        .y_desc("ms")
        .y_label_formatter(&whole)
        .x_label_formatter(&whole)
        .light_line_style(WHITE)
        .draw()?;
    for (of, colour, name) in
        [((|s| s.p50_ms) as fn(&Second) -> Option<f64>, MEDIAN, "p50"), (|s: &Second| s.p99_ms, TAIL, "p99")]
    {
        let points = live().filter_map(|s| Some((millions(s.rows), of(s)?)));
        latency
            .draw_series(points.map(|point| Circle::new(point, 2, colour.mix(0.6).filled())))?
            .label(name)
            .legend(move |(x, y)| Circle::new((x + 10, y), 3, colour.filled()));
    }
    latency.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.3)).draw()?;
    root.present()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_holds_a_mark_for_every_second_and_its_axes() {
        let second = |rows, phase| Second {
            seconds: 1.0,
            rows,
            rows_per_second: 1_000.0,
            p50_ms: Some(20.0),
            p99_ms: None,
            phase,
        };
        let text = growth(&[second(1_000_000, Phase::Arrays), second(2_000_000, Phase::Live)], &[]).unwrap();
        assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>"), "{text}");
        // One rate and one median; the legends have four more.
        assert_eq!(text.matches("<circle").count(), 6, "{text}");
        assert!(text.contains("rows in the table, millions"), "{text}");
    }
}
