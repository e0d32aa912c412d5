// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `doorless top`: what running daemons are asked, live on a terminal or as JSON for scripts.
//!
//! [`sample`] asks each daemon on a thread of its own, so that one that does not answer holds up nothing; [`rates`] makes
//! rates of two answers; [`view`] shows them.

mod rates;
mod sample;
mod view;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use clap::Args;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use serde_json::json;

use rates::DaemonRates;
use sample::{Heard, Sample};
use view::View;

/// Options of `top`.
#[derive(Args)]
pub struct Options {
    /// Sockets of monitors that are free: `doorless serve --monitor`, or a `--chardev` of the daemon.
    #[arg(required = true, value_name = "SOCKET")]
    sockets: Vec<PathBuf>,
    /// Seconds from look to look.
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    interval: f64,
    /// One JSON object a line and interval, for programs.
    #[arg(long)]
    json: bool,
    /// End after this many intervals.
    #[arg(long, value_name = "N")]
    count: Option<u64>,
}

/// Shows until told otherwise.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let interval = Duration::try_from_secs_f64(options.interval).ok().filter(|interval| !interval.is_zero());
    let interval = interval.with_context(|| format!("{} seconds are no interval", options.interval))?;
    if !options.json && !std::io::stdout().is_terminal() {
        bail!("standard output is no terminal: use --json");
    }
    let mut watch = Watch::new(&options.sockets, interval);
    if options.json { print(&mut watch, options.count) } else { show(&mut watch, options.count) }
}

/// The daemons, as they were last heard of.
struct Watch {
    interval: Duration,
    heard: Receiver<Heard>,
    daemons: Vec<Daemon>,
}

struct Daemon {
    socket: PathBuf,
    last: Option<Sample>,
    rates: Result<DaemonRates, String>,
}

impl Watch {
    fn new(sockets: &[PathBuf], interval: Duration) -> Watch {
        let waiting = || Err("waiting for its monitor".to_owned());
        let daemons =
            sockets.iter().map(|socket| Daemon { socket: socket.clone(), last: None, rates: waiting() }).collect();
        Watch { interval, heard: sample::start(sockets, interval), daemons }
    }

    /// Takes in what was heard until `deadline`; whether that is every daemon's second answer or beyond.
    fn listen(&mut self, deadline: Instant) {
        while let Ok(Heard { index, sample }) =
            self.heard.recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            let daemon = &mut self.daemons[index];
            match sample {
                Ok(sample) => {
                    daemon.rates = Ok(rates::between(daemon.last.as_ref(), &sample));
                    daemon.last = Some(sample);
                }
                Err(why) => {
                    daemon.rates = Err(why);
                    daemon.last = None;
                }
            }
        }
    }
}

fn print(watch: &mut Watch, count: Option<u64>) -> anyhow::Result<()> {
    // The first answers are what the first interval is measured from.
    let mut next = Instant::now() + watch.interval / 2;
    watch.listen(next);
    let mut done = 0;
    while count.is_none_or(|count| done < count) {
        next += watch.interval;
        watch.listen(next);
        let daemons: Vec<_> =
            watch.daemons.iter().map(|daemon| rates::to_json(&daemon.socket, &daemon.rates)).collect();
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let mut out = std::io::stdout().lock();
        let line = json!({ "time": time, "interval": watch.interval.as_secs_f64(), "daemons": daemons });
        if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
            // Whoever read has enough.
            return Ok(());
        }
        done += 1;
    }
    Ok(())
}

fn show(watch: &mut Watch, count: Option<u64>) -> anyhow::Result<()> {
    let mut terminal = ratatui::try_init().context("could not take over the terminal")?;
    let ended = show_on(&mut terminal, watch, count);
    ratatui::restore();
    ended
}

fn show_on(terminal: &mut ratatui::DefaultTerminal, watch: &mut Watch, count: Option<u64>) -> anyhow::Result<()> {
    /// How long a key may wait.
    const PROMPT: Duration = Duration::from_millis(50);
    let mut view = View::default();
    let mut next = Instant::now() + watch.interval;
    let mut done = 0;
    loop {
        terminal.draw(|frame| view.draw(frame, &watch.daemons, watch.interval))?;
        watch.listen(Instant::now() + PROMPT);
        while event::poll(Duration::ZERO)? {
            match event::read()? {
                Event::Key(key) if ends(&key) => return Ok(()),
                Event::Key(key) if key.kind != KeyEventKind::Release => view.press(key.code),
                _ => {}
            }
        }
        if Instant::now() >= next {
            next += watch.interval;
            done += 1;
            if count.is_some_and(|count| done >= count) {
                return Ok(());
            }
        }
    }
}

fn ends(key: &KeyEvent) -> bool {
    let interrupt = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    interrupt || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc)
}
