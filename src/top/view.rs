// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The picture: one table, a block of rows for each daemon.

use std::time::Duration;

use ratatui::Frame;
use ratatui::crossterm::event::KeyCode;
use ratatui::layout::{Alignment, Constraint, Layout};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Cell, Paragraph, Row, Table};

use super::Daemon;
use super::rates::{DaemonRates, Rates};

/// What stands over the columns, and how wide they are; the first takes what is left.
const COLUMNS: [(&str, u16); 10] = [
    ("", 0),
    ("read/s", 9),
    ("write/s", 9),
    ("other/s", 8),
    ("read", 11),
    ("written", 11),
    ("p50", 8),
    ("p99", 8),
    ("p99.9", 8),
    ("failed/s", 8),
];
const KEYS: &str = "q quit  c clients  n nodes  f fd sets  ↑↓ scroll";

/// What is shown of it all.
pub struct View {
    clients: bool,
    nodes: bool,
    fdsets: bool,
    /// Rows above the first that is shown.
    above: usize,
}

impl Default for View {
    fn default() -> View {
        View { clients: true, nodes: true, fdsets: true, above: 0 }
    }
}

impl View {
    /// Does what a key is for.
    pub fn press(&mut self, key: KeyCode) {
        match key {
            KeyCode::Char('c') => self.clients = !self.clients,
            KeyCode::Char('n') => self.nodes = !self.nodes,
            KeyCode::Char('f') => self.fdsets = !self.fdsets,
            KeyCode::Up | KeyCode::Char('k') => self.above = self.above.saturating_sub(1),
            KeyCode::Down | KeyCode::Char('j') => self.above = self.above.saturating_add(1),
            KeyCode::PageUp => self.above = self.above.saturating_sub(20),
            KeyCode::PageDown => self.above = self.above.saturating_add(20),
            KeyCode::Home => self.above = 0,
            _ => {}
        }
    }

    /// Draws everything.
    pub fn draw(&mut self, frame: &mut Frame<'_>, daemons: &[Daemon], interval: Duration) {
        let [head, body] = Layout::vertical([Constraint::Length(1), Constraint::Min(0)]).areas(frame.area());
        let count = daemons.len();
        let title = format!("doorless top · {count} daemon{} · every {interval:?}", if count == 1 { "" } else { "s" });
        frame.render_widget(Paragraph::new(title).style(Style::new().add_modifier(Modifier::BOLD)), head);
        frame.render_widget(Paragraph::new(KEYS).alignment(Alignment::Right), head);
        let rows: Vec<Row<'static>> = daemons.iter().flat_map(|daemon| self.daemon(daemon)).collect();
        let shown = usize::from(body.height.saturating_sub(1));
        self.above = self.above.min(rows.len().saturating_sub(shown));
        let heading = COLUMNS.iter().map(|(name, _)| right((*name).to_owned()));
        let heading = Row::new(heading).style(Style::new().add_modifier(Modifier::REVERSED));
        let widths = COLUMNS.map(|(_, width)| if width == 0 { Constraint::Min(24) } else { Constraint::Length(width) });
        frame.render_widget(Table::new(rows.into_iter().skip(self.above), widths).header(heading), body);
    }

    fn daemon(&self, daemon: &Daemon) -> Vec<Row<'static>> {
        let bold = Style::new().add_modifier(Modifier::BOLD);
        let socket = daemon.socket.display();
        let daemon = match &daemon.rates {
            Ok(daemon) => daemon,
            Err(why) => return vec![line(format!("{socket}: {}", clean(why))).style(bold)],
        };
        let DaemonRates { pid, exports, nodes, fdsets } = daemon;
        let clients: usize = exports.iter().map(|export| export.clients.len()).sum();
        let descriptors: usize = fdsets.iter().map(|set| set.descriptors).sum();
        let facts = format!(
            "{socket} · process {pid} · {} exports, {clients} clients, {} nodes, {descriptors} descriptors in {} fd sets",
            exports.len(),
            nodes.len(),
            fdsets.len()
        );
        let mut rows = vec![line(facts).style(bold)];
        for export in exports {
            let name = format!("  {} {} of node {}", export.kind, clean(&export.id), clean(&export.node));
            rows.push(row(name, &export.rates));
            for client in export.clients.iter().filter(|_| self.clients) {
                rows.push(row(format!("    client {}: {}", client.id, clean(&client.peer)), &client.rates));
            }
        }
        for node in nodes.iter().filter(|_| self.nodes) {
            let name =
                format!("  node {} ({}, {})", clean(&node.name), clean(&node.driver), bytes(as_float(node.size)));
            rows.push(row(name, &node.rates));
        }
        for set in fdsets.iter().filter(|_| self.fdsets) {
            let users = if set.users.is_empty() { "nobody".to_owned() } else { set.users.join(", ") };
            let text = format!("  fd set {}: {} for {} {}", set.id, set.descriptors, clean(&users), clean(&set.opaque));
            rows.push(line(text));
        }
        rows
    }
}

/// A row of one cell over all columns.
fn line(text: String) -> Row<'static> {
    Row::new([Cell::new(text).column_span(u16::try_from(COLUMNS.len()).unwrap_or(1))])
}

fn row(name: String, rates: &Rates) -> Row<'static> {
    let Rates { reads, writes, others, failures, read_bytes, written_bytes, latency } = *rates;
    let time = |ns: Option<u64>| ns.map_or_else(|| "-".to_owned(), duration);
    let cells = [
        number(reads),
        number(writes),
        number(others),
        format!("{}/s", bytes(read_bytes)),
        format!("{}/s", bytes(written_bytes)),
        time(latency.map(|latency| latency.half)),
        time(latency.map(|latency| latency.p99)),
        time(latency.map(|latency| latency.p999)),
        number(failures),
    ];
    Row::new(std::iter::once(Cell::new(name)).chain(cells.into_iter().map(right)))
}

fn right(text: String) -> Cell<'static> {
    Cell::new(Line::from(text).alignment(Alignment::Right))
}

/// Names come from others: nothing in them may move the cursor.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '·' } else { c }).collect()
}

fn number(value: f64) -> String {
    if value >= 100_000.0 { format!("{:.0}k", value / 1000.0) } else { format!("{value:.0}") }
}

fn bytes(value: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let (mut value, mut unit) = (value, 0);
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value >= 100.0 {
        format!("{value:.0} {}", units[unit])
    } else {
        format!("{value:.1} {}", units[unit])
    }
}

fn duration(ns: u64) -> String {
    let us = as_float(ns) / 1000.0;
    match us {
        us if us < 9.95 => format!("{us:.1} µs"),
        us if us < 1000.0 => format!("{us:.0} µs"),
        us if us < 9950.0 => format!("{:.1} ms", us / 1000.0),
        us if us < 1_000_000.0 => format!("{:.0} ms", us / 1000.0),
        us => format!("{:.1} s", us / 1_000_000.0),
    }
}

#[allow(clippy::cast_precision_loss, reason = "for people")]
fn as_float(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::super::rates::{ClientRates, ExportRates, NodeRates, Percentiles};
    use super::super::sample::Fdset;
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn daemons() -> Vec<Daemon> {
        let latency = Some(Percentiles { half: 1_500, p99: 24_576_000, p999: 2_000_000_000 });
        let rates = Rates { reads: 123_456.0, read_bytes: 505_675_776.0, failures: 3.0, latency, ..Rates::default() };
        let node = NodeRates { name: "disk".into(), driver: "raw".into(), size: 1 << 30, rates };
        let client = ClientRates { id: 7, peer: "process 1\x1b[2J, user 0".into(), rates };
        let export = ExportRates {
            id: "e".into(),
            kind: "nbd".into(),
            node: "disk".into(),
            rates,
            clients: vec![client.clone(), ClientRates { rates: Rates::default(), id: 8, ..client }],
        };
        let set = Fdset { id: 0, descriptors: 1, opaque: "a file".into(), users: vec!["disk".into()] };
        let rates = DaemonRates { pid: 42, exports: vec![export], nodes: vec![node], fdsets: vec![set] };
        vec![
            Daemon { socket: "/run/a".into(), last: None, rates: Ok(rates) },
            Daemon { socket: "/run/b".into(), last: None, rates: Err("nobody listens".into()) },
        ]
    }

    fn lines(view: &mut View, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal in memory");
        terminal.draw(|frame| view.draw(frame, &daemons(), Duration::from_secs(1))).expect("drawn");
        let buffer = terminal.backend().buffer().clone();
        let row = |y: u16| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
        (0..height).map(row).collect()
    }

    #[test]
    fn everything_stands_in_its_column_and_nothing_breaks_out() {
        let lines = lines(&mut View::default(), 140, 12);
        assert!(
            lines[0].starts_with("doorless top · 2 daemons · every 1s") && lines[0].ends_with("scroll"),
            "{lines:#?}"
        );
        let heading: Vec<&str> = lines[1].split_whitespace().collect();
        assert_eq!(heading, COLUMNS[1..].iter().map(|(name, _)| *name).collect::<Vec<_>>());
        let facts = "/run/a · process 42 · 1 exports, 2 clients, 1 nodes, 1 descriptors in 1 fd sets";
        assert_eq!(lines[2], facts, "{lines:#?}");
        let numbers = ["123k", "0", "0", "482 MiB/s", "0 B/s", "1.5 µs", "25 ms", "2.0 s", "3"];
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        for (line, name) in
            [(3, "nbd e of node disk"), (4, "client 7: process 1·[2J, user 0"), (6, "node disk (raw, 1.0 GiB)")]
        {
            assert_eq!(words(&lines[line]), words(&format!("{name} {}", numbers.join(" "))), "{lines:#?}");
        }
        assert!(lines[5].contains("client 8") && lines[5].contains(" - "), "{lines:#?}");
        assert!(lines[7].contains("fd set 0: 1 for disk a file"));
        assert_eq!(lines[8], "/run/b: nobody listens");
    }

    #[test]
    fn keys_hide_and_scroll_and_a_small_terminal_is_no_trouble() {
        let mut view = View::default();
        for key in ['c', 'n', 'f'] {
            view.press(KeyCode::Char(key));
        }
        let shown = lines(&mut view, 140, 12);
        assert!(!shown.iter().any(|line| line.contains("client 7") || line.contains("fd set 0:")), "{shown:#?}");
        view.press(KeyCode::PageDown);
        let scrolled = lines(&mut view, 140, 4);
        assert_eq!(scrolled[3], "/run/b: nobody listens", "the end stays in sight");
        for (width, height) in [(1, 1), (20, 2), (80, 3)] {
            lines(&mut view, width, height);
        }
    }
}
