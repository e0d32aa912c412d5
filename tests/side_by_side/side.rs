// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One of the two that are compared: a server, a client of it, and its answers without what may differ.
#![allow(clippy::unwrap_used, unreachable_pub)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::Signal;
use serde_json::{Value, json};

/// One `sendmsg` and what it carries.
#[derive(Clone, Debug)]
pub struct Step {
    /// `$N` stands for the number of the N-th descriptor that was added.
    pub text: String,
    pub fds: usize,
    /// The message is not complete yet: no answer is waited for.
    pub more: bool,
}

impl Step {
    pub fn new(text: impl Into<String>, fds: usize) -> Step {
        Step { text: text.into(), fds, more: false }
    }
}

/// A server and a client of it that writes answers down in a form that can be compared.
pub struct Side {
    child: Child,
    socket: UnixStream,
    lines: BufReader<UnixStream>,
    /// What stands for numbers of descriptors: by order of adding.
    added: Vec<i64>,
    marks: u64,
    /// Words of this side and what stands for them.
    pub replaced: Vec<(String, &'static str)>,
}

impl Side {
    pub fn start(command: &mut Command, path: &Path, replaced: Vec<(String, &'static str)>) -> Side {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        // QEMU greets a client twice, or hangs up, that comes before its monitor is set up: nothing is asked of the first ones
        // but to be answered.
        let (socket, lines) = loop {
            let Ok((mut socket, mut lines)) = connect(path) else { continue };
            let asked = socket.write_all(b"{\"execute\":\"qmp_capabilities\"}\n");
            let answered = |line: &std::io::Result<String>| line.as_ref().map_or(true, |line| line.contains("return"));
            if asked.is_ok() && matches!(lines.by_ref().lines().find(answered), Some(Ok(_))) {
                break (socket, lines);
            }
        };
        let mut side = Side { child, socket, lines, added: Vec::new(), marks: 0, replaced };
        side.reconnect(path);
        side
    }

    pub fn reconnect(&mut self, path: &Path) {
        // Each side closes when it has seen the end. QEMU may hang up on the next client if that comes before.
        self.socket.shutdown(std::net::Shutdown::Write).unwrap();
        std::io::copy(&mut self.lines, &mut std::io::sink()).unwrap();
        (self.socket, self.lines) = connect(path).unwrap();
        self.added.clear();
        self.marks = 0;
    }

    fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> std::io::Result<()> {
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        assert_eq!(sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?, bytes.len());
        Ok(())
    }

    /// Whether it ends by `abort`, having hung up.
    fn aborts(&mut self) -> bool {
        for _ in 0..1000 {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.signal() == Some(Signal::ABORT.as_raw());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    }

    /// Sends a step and gives everything that is answered to it, one line each.
    pub fn play(&mut self, step: &Step, disk: &File) -> String {
        self.try_play(step, disk).unwrap_or_else(|| panic!("it aborted at {step:?}"))
    }

    /// The same; `None` if the server aborted instead.
    pub fn try_play(&mut self, step: &Step, disk: &File) -> Option<String> {
        let mut text = step.text.clone();
        for (index, fd) in self.added.iter().enumerate().rev() {
            text = text.replace(&format!("${index}"), &fd.to_string());
        }
        let fds = vec![disk.as_fd(); step.fds];
        let mut sent = self.send(text.as_bytes(), &fds);
        if step.more && sent.is_ok() {
            return Some(String::new());
        }
        self.marks += 1;
        let mark = json!(format!("mark-{}", self.marks));
        if sent.is_ok() {
            sent = self.send(format!("{{\"execute\":\"query-commands\",\"id\":{mark}}}").as_bytes(), &[]);
        }
        let mut answers = String::new();
        loop {
            let mut line = String::new();
            let read = self.lines.read_line(&mut line);
            if !matches!(read, Ok(1..)) && self.aborts() {
                return None;
            }
            sent.as_ref().unwrap();
            assert!(matches!(read, Ok(1..)), "no answer to {step:?} ({read:?}); so far:\n{answers}");
            let answer: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line}: {e}"));
            if answer.get("id") == Some(&mark) {
                return Some(answers);
            }
            if answer.get("event").is_none() {
                let answer = self.normalised(answer);
                writeln!(answers, "{answer}").unwrap();
            }
        }
    }

    /// The answer without what may differ.
    fn normalised(&mut self, mut answer: Value) -> String {
        let returned = &mut answer["return"];
        if returned.get("fdset-id").is_some() {
            self.added.push(returned["fd"].as_i64().unwrap());
        }
        let symbols: BTreeMap<i64, usize> = self.added.iter().enumerate().map(|(index, &fd)| (fd, index)).collect();
        rename(returned, &symbols);
        if answer["return"].is_null() {
            answer.as_object_mut().unwrap().remove("return");
        }
        if let Some(desc) = answer["error"]["desc"].as_str()
            && let Some((before, after)) = desc.split_once(", fd:")
        {
            let after = after.trim_start_matches(|c: char| c.is_ascii_digit());
            answer["error"]["desc"] = json!(format!("{before}, fd:N{after}"));
        }
        if answer["error"].is_null() {
            answer.as_object_mut().unwrap().remove("error");
        }
        let mut text = answer.to_string();
        for (own, common) in &self.replaced {
            text = text.replace(own.as_str(), common);
        }
        text
    }
}

/// Numbers of descriptors, wherever they stand, become their place in the order of adding.
fn rename(value: &mut Value, symbols: &BTreeMap<i64, usize>) {
    match value {
        Value::Object(members) => {
            for (key, value) in members {
                match value.as_i64().and_then(|fd| symbols.get(&fd)).filter(|_| key == "fd") {
                    Some(symbol) => *value = json!(format!("#{symbol}")),
                    None => rename(value, symbols),
                }
            }
        }
        Value::Array(elements) => elements.iter_mut().for_each(|element| rename(element, symbols)),
        _ => {}
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client that has been greeted; an error if it was hung up on.
fn connect(path: &Path) -> std::io::Result<(UnixStream, BufReader<UnixStream>)> {
    let socket = loop {
        match UnixStream::connect(path) {
            Ok(socket) => break socket,
            Err(_) => std::thread::yield_now(),
        }
    };
    // Only for a diagnosis: nothing that works takes a minute.
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut lines = BufReader::new(socket.try_clone().unwrap());
    lines.read_line(&mut String::new())?;
    Ok((socket, lines))
}
