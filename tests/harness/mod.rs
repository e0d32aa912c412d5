// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the tests of the real program share: starting it, asking foreign judges, making images.
#![allow(dead_code, missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, unreachable_pub)]

use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};

use manager::daemon::Daemon;
use manager::inspector::Program;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

pub const DOORLESS: &str = env!("CARGO_BIN_EXE_doorless");

/// Whether every one of `tools` is there. If not, the test that asks must return: a named skip on a user's machine, a failure
/// in CI.
pub fn judges(test: &str, tools: &[&str]) -> bool {
    let mut paths: Vec<PathBuf> = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).collect();
    paths.extend(["/sbin".into(), "/usr/sbin".into()]);
    let missing: Vec<&&str> = tools.iter().filter(|tool| !paths.iter().any(|dir| dir.join(tool).is_file())).collect();
    if missing.is_empty() {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "{test} needs {missing:?}, and CI must have them");
    eprintln!("skipped: {test}: needs {missing:?} (make judges)");
    false
}

/// A Python that has `module`: Debian's own first, because another one in PATH does not see Debian's packages.
pub fn python_with(test: &str, module: &str) -> Option<&'static str> {
    let has = |python: &&str| {
        let output = Command::new(python).args(["-c", &format!("import {module}")]).output();
        output.is_ok_and(|output| output.status.success())
    };
    let found = ["/usr/bin/python3", "python3"].into_iter().find(has);
    if found.is_none() {
        assert!(std::env::var_os("CI").is_none(), "{test} needs Python's {module}, and CI must have it");
        eprintln!("skipped: {test}: needs Python's {module} (make judges)");
    }
    found
}

/// Runs a command that must succeed; its standard output.
pub fn run(program: &str, arguments: &[&str]) -> String {
    run_in(Path::new("."), program, arguments)
}

/// The same in a directory.
pub fn run_in(directory: &Path, program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(directory).stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{text}{errors}", output.status);
    text
}

/// Runs the program to its end: exit status, standard output, standard error.
pub fn doorless(arguments: &[&str]) -> (ExitStatus, String, String) {
    let output = Command::new(DOORLESS).args(arguments).stdin(Stdio::null()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status, text(&output.stdout), text(&output.stderr))
}

pub fn program() -> Program {
    Program { executable: DOORLESS.into(), confinement: Vec::new() }
}

/// A directory that goes with the value, and paths in it.
pub struct Scratch(tempfile::TempDir);

impl Scratch {
    pub fn new() -> Scratch {
        Scratch(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The path as text, for argument lists.
    pub fn name(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }
}

/// `doorless serve`, ready.
pub struct Serve {
    child: Child,
    _out: BufReader<ChildStdout>,
    pub uri: String,
    /// Lines before the ready line.
    pub said: Vec<String>,
}

impl Serve {
    pub fn start(arguments: &[&str]) -> Serve {
        let mut command = Command::new(DOORLESS);
        let mut child = command.arg("serve").args(arguments).stdout(Stdio::piped()).spawn().unwrap();
        let mut said = Vec::new();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while out.read_line(&mut line).unwrap() > 0 {
            if let Some(uri) = line.trim_end().strip_prefix("ready: ") {
                return Serve { child, _out: out, uri: uri.to_owned(), said };
            }
            said.push(std::mem::take(&mut line).trim_end().to_owned());
        }
        panic!("doorless serve {arguments:?} ended before it was ready ({:?}): {said:?}", child.wait());
    }

    /// The confined daemon's process id.
    pub fn daemon_pid(&self) -> u32 {
        let line = self.said.iter().find_map(|line| line.strip_prefix("daemon: process ")).unwrap();
        line.split(',').next().unwrap().parse().unwrap()
    }

    /// Has another daemon take over.
    pub fn upgrade(&self) {
        kill_process(Pid::from_child(&self.child), Signal::USR1).unwrap();
    }

    /// The processes that the manager has started and that are still there.
    pub fn daemons(&self) -> String {
        let pid = self.child.id();
        std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap()
    }

    /// The manager's end without a warning.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Ctrl-C, and the end.
    pub fn interrupt(mut self) -> ExitStatus {
        kill_process(Pid::from_child(&self.child), Signal::INT).unwrap();
        self.child.wait().unwrap()
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        // In order, so that no daemon has the image locked a moment longer than this value lives; a test that failed may have
        // left something that does not end so.
        if std::thread::panicking() {
            let _ = self.child.kill();
        } else if matches!(self.child.try_wait(), Ok(None)) {
            let _ = kill_process(Pid::from_child(&self.child), Signal::INT);
        }
        let _ = self.child.wait();
    }
}

/// A confined daemon with a monitor, and the commands that tests need most.
pub struct TestDaemon {
    pub daemon: Daemon,
    scratch: Scratch,
}

impl TestDaemon {
    pub fn start() -> TestDaemon {
        TestDaemon { daemon: Daemon::start(&program()).unwrap(), scratch: Scratch::new() }
    }

    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// A command that must succeed.
    pub fn ok(&mut self, command: &str, arguments: Value) -> Value {
        self.daemon.execute(command, arguments, &[]).unwrap()
    }

    /// A command that must succeed, with a descriptor.
    pub fn ok_with(&mut self, command: &str, arguments: Value, fd: impl AsFd) -> Value {
        self.daemon.execute(command, arguments, &[fd.as_fd()]).unwrap()
    }

    /// A command that must fail: the text of its error.
    pub fn error(&mut self, command: &str, arguments: Value) -> String {
        self.error_with(command, arguments, &[])
    }

    pub fn error_with(&mut self, command: &str, arguments: Value, fds: &[BorrowedFd<'_>]) -> String {
        match self.daemon.execute(command, arguments, fds) {
            Err(manager::Error::Daemon { source: qmp_error, .. }) => qmp_error.to_string(),
            other => panic!("{command} should have failed: {other:?}"),
        }
    }

    /// Passes `file` into a new set; its id.
    pub fn add_fd(&mut self, file: impl AsFd) -> i64 {
        self.ok_with("add-fd", json!({}), file)["fdset-id"].as_i64().unwrap()
    }

    /// A node over a file, with a format's driver on top unless it is `file`.
    pub fn add_node(&mut self, name: &str, driver: &str, file: impl AsFd, read_only: bool) {
        let set = self.add_fd(file);
        let file = json!({ "driver": "file", "filename": format!("/dev/fdset/{set}"), "read-only": read_only });
        let node =
            json!({ "driver": driver, "node-name": name, "read-only": read_only, "discard": "unmap", "file": file });
        self.ok("blockdev-add", node);
    }

    /// Serves NBD on a socket in the scratch directory.
    pub fn start_nbd(&mut self) {
        let listener = UnixListener::bind(self.socket()).unwrap();
        self.ok_with("getfd", json!({ "fdname": "nbd" }), &listener);
        self.ok("nbd-server-start", json!({ "addr": { "type": "fd", "data": { "str": "nbd" } } }));
    }

    pub fn export(&mut self, node: &str, writable: bool) {
        self.ok("block-export-add", json!({ "type": "nbd", "id": node, "node-name": node, "writable": writable }));
    }

    pub fn socket(&self) -> PathBuf {
        self.scratch.path("nbd.sock")
    }

    pub fn uri(&self, node: &str) -> String {
        manager::serve::uri(&self.socket(), node)
    }

    /// Numbers and targets of its open descriptors.
    pub fn open_fds(&self) -> Vec<String> {
        open_fds(self.pid())
    }
}

/// What a process has open, as /proc tells it.
pub fn open_fds(pid: u32) -> Vec<String> {
    let mut fds: Vec<String> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let target = std::fs::read_link(entry.path()).ok()?;
            Some(format!("{} -> {}", entry.file_name().display(), target.display()))
        })
        .collect();
    fds.sort();
    fds
}

/// Bytes that are different everywhere and compress a little.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len)
        .map(|at| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            if at / 512 % 3 == 0 { (at / 512) as u8 } else { (state >> 56) as u8 }
        })
        .collect()
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A server in a child process; dropping the value sends it the signal and waits for its end.
pub struct Running(pub Child, pub Signal);

impl Running {
    /// Starts it, and returns when it takes clients at `socket`.
    pub fn start(program: &str, arguments: &[&str], socket: &str, end: Signal) -> Running {
        let mut child = Command::new(program).args(arguments).stdout(Stdio::null()).spawn().unwrap();
        while UnixStream::connect(socket).is_err() {
            assert_eq!(child.try_wait().unwrap(), None, "{program} {arguments:?}");
            std::thread::yield_now();
        }
        Running(child, end)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.0), self.1);
        let _ = self.0.wait();
    }
}
