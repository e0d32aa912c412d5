// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The servers: how each is started on a disk, and what it uses.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What a disk's bytes are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Raw,
    Qcow2,
    /// An empty image of 64 GiB, made anew for each measurement.
    EmptyQcow2,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 | Format::EmptyQcow2 => "qcow2",
        }
    }
}

/// A server under comparison.
pub struct Server {
    pub name: &'static str,
    program: &'static str,
    formats: &'static [Format],
    arguments: fn(image: &str, format: &str, socket: &str, read_only: bool, direct: bool) -> Vec<String>,
    /// Whether it can bypass the host's cache.
    direct: bool,
    /// Whether it is compared only where reads have to wait.
    waiting_only: bool,
}

/// Ours first: ratios are ours against each of the others.
pub const SERVERS: &[Server] = &[
    Server {
        name: "doorless",
        program: env!("CARGO_BIN_EXE_doorless"),
        formats: &[Format::Raw, Format::Qcow2, Format::EmptyQcow2],
        direct: true,
        waiting_only: false,
        arguments: |image, format, socket, read_only, direct| {
            let mut arguments = words(&["serve", "--format", format, "--socket", socket, image]);
            if read_only {
                arguments.push("--read-only".into());
            }
            if direct {
                arguments.push("--direct".into());
            }
            arguments
        },
    },
    Server {
        name: "doorless threads",
        program: env!("CARGO_BIN_EXE_doorless"),
        formats: &[Format::Raw, Format::Qcow2],
        direct: true,
        waiting_only: true,
        arguments: |image, format, socket, read_only, direct| {
            let mut arguments = (SERVERS[0].arguments)(image, format, socket, read_only, direct);
            arguments.push("--aio=threads".into());
            arguments
        },
    },
    Server {
        name: "qemu-storage-daemon",
        program: "qemu-storage-daemon",
        formats: &[Format::Raw, Format::Qcow2, Format::EmptyQcow2],
        direct: true,
        waiting_only: false,
        arguments: |image, format, socket, read_only, direct| {
            let switch = if read_only { "on" } else { "off" };
            let writable = if read_only { "off" } else { "on" };
            words(&[
                "--blockdev",
                &format!("driver=file,node-name=file,filename={image},read-only={switch}{}", qemu_cache(direct)),
                "--blockdev",
                &format!("driver={format},node-name=disk,file=file,read-only={switch}"),
                "--nbd-server",
                &format!("addr.type=unix,addr.path={socket}"),
                "--export",
                &format!("nbd,id=disk,node-name=disk,name=,writable={writable}"),
            ])
        },
    },
    Server {
        name: "qemu-nbd",
        program: "qemu-nbd",
        formats: &[Format::Raw, Format::Qcow2, Format::EmptyQcow2],
        direct: true,
        waiting_only: false,
        arguments: |image, format, socket, read_only, direct| {
            let cache: &[&str] = if direct { &["--cache=none", "--aio=io_uring"] } else { &["--cache=writeback"] };
            let mut arguments = words(&[&["-t", "-e", "16", "-f", format, "-k", socket, image], cache].concat());
            if read_only {
                arguments.push("-r".into());
            }
            arguments
        },
    },
    Server {
        name: "nbdkit",
        program: "nbdkit",
        formats: &[Format::Raw],
        direct: false,
        waiting_only: false,
        arguments: |image, _, socket, read_only, _| {
            let mut arguments = words(&["-f", "-U", socket]);
            if read_only {
                arguments.push("-r".into());
            }
            arguments.extend(words(&["file", image]));
            arguments
        },
    },
];

/// The same for a front end of vhost-user-blk in place of an NBD client.
#[allow(dead_code, reason = "each benchmark has its own list")]
pub const VHOST_USER: &[Server] = &[
    Server {
        name: "doorless",
        program: env!("CARGO_BIN_EXE_doorless"),
        formats: &[Format::Raw, Format::Qcow2],
        direct: true,
        waiting_only: false,
        arguments: |image, format, socket, read_only, direct| {
            let mut arguments = words(&["serve", "--format", format, "--vhost-user", socket, image]);
            if read_only {
                arguments.push("--read-only".into());
            }
            if direct {
                arguments.push("--direct".into());
            }
            arguments
        },
    },
    Server {
        name: "qemu-storage-daemon",
        program: "qemu-storage-daemon",
        formats: &[Format::Raw, Format::Qcow2],
        direct: true,
        waiting_only: false,
        arguments: |image, format, socket, read_only, direct| {
            let switch = if read_only { "on" } else { "off" };
            let writable = if read_only { "off" } else { "on" };
            words(&[
                "--blockdev",
                &format!("driver=file,node-name=file,filename={image},read-only={switch}{}", qemu_cache(direct)),
                "--blockdev",
                &format!("driver={format},node-name=disk,file=file,read-only={switch}"),
                "--export",
                &format!("vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path={socket},writable={writable}"),
            ])
        },
    },
];

/// The best that QEMU does past the cache.
fn qemu_cache(direct: bool) -> &'static str {
    if direct { ",cache.direct=on,aio=io_uring" } else { "" }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

impl Server {
    pub fn is_there(&self) -> bool {
        let paths = std::env::var_os("PATH").unwrap_or_default();
        Path::new(self.program).is_absolute()
            || std::env::split_paths(&paths).any(|dir| dir.join(self.program).is_file())
    }

    /// Whether it serves such a disk.
    pub fn reads(&self, format: Format) -> bool {
        self.formats.contains(&format)
    }

    /// Whether it has a part in a comparison in which reads wait, or pass by the cache.
    pub fn takes_part(&self, waits: bool, direct: bool) -> bool {
        (waits || !self.waiting_only) && (self.direct || !direct)
    }

    /// Starts it; returns once it accepts clients.
    pub fn start(&self, image: &Path, format: Format, dir: &Path, read_only: bool, direct: bool) -> Running {
        let socket = dir.join("socket");
        let _ = fs::remove_file(&socket);
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let arguments = (self.arguments)(&text(image), format.name(), &text(&socket), read_only, direct);
        let started = Instant::now();
        let mut child =
            Command::new(self.program).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        while UnixStream::connect(&socket).is_err() {
            assert_eq!(child.try_wait().unwrap(), None, "{} ended before it served", self.name);
            std::thread::sleep(Duration::from_micros(200));
        }
        Running { child, socket, started }
    }
}

/// A qcow2 image with the same content; `None` without qemu-img.
pub fn convert(raw: &Path, qcow2: &Path) -> Option<PathBuf> {
    let status = Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).args([raw, qcow2]).status();
    status.is_ok_and(|status| status.success()).then(|| qcow2.to_owned())
}

/// An empty qcow2 image of 64 GiB.
pub fn make_empty(qcow2: &Path) {
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(qcow2).arg("64G").status().unwrap();
    assert!(made.success());
}

/// A server that is serving.
pub struct Running {
    child: Child,
    pub socket: PathBuf,
    pub started: Instant,
}

impl Running {
    /// CPU time that all of its processes have used.
    pub fn cpu(&self) -> Duration {
        // utime and stime, in ticks of 10 ms on every Linux that Rust runs on.
        let ticks: u64 = self.processes().iter().map(|stat| stat.ticks).sum();
        Duration::from_millis(ticks * 10)
    }

    /// Resident memory of all of its processes, bytes.
    pub fn memory(&self) -> u64 {
        self.processes().iter().map(|stat| stat.resident_pages * 4096).sum()
    }

    /// The started process and its descendants.
    fn processes(&self) -> Vec<Stat> {
        let stats: BTreeMap<u32, Stat> = fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter_map(|pid| Some((pid, Stat::of(pid)?)))
            .collect();
        let is_ours = |mut pid: u32| loop {
            if pid == self.child.id() {
                return true;
            }
            match stats.get(&pid) {
                Some(stat) if stat.parent > 1 => pid = stat.parent,
                _ => return false,
            }
        };
        stats.iter().filter(|&(&pid, _)| is_ours(pid)).map(|(_, stat)| stat.clone()).collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}

/// What /proc/PID/stat says (proc_pid_stat(5)).
#[derive(Clone)]
struct Stat {
    parent: u32,
    ticks: u64,
    resident_pages: u64,
}

impl Stat {
    fn of(pid: u32) -> Option<Stat> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is a name in parentheses, which may hold blanks.
        let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        let ticks = number(14)? + number(15)?;
        Some(Stat { parent: u32::try_from(number(4)?).ok()?, ticks, resident_pages: number(24)? })
    }
}
