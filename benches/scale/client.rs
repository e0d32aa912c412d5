// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A daemon with exports, and plain NBD clients of it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use manager::daemon::Daemon;
use manager::inspector::Program;
use serde_json::{Value, json};

/// Bytes of a request's data.
pub const BLOCK: usize = 4096;
/// Bytes of a simple reply before its data.
const HEADER: usize = 16;

/// A confined daemon that serves NBD on a socket in a directory of its own.
pub struct Served {
    daemon: Daemon,
    dir: tempfile::TempDir,
}

impl Served {
    pub fn start() -> Served {
        let program = Program { executable: env!("CARGO_BIN_EXE_doorless").into(), confinement: Vec::new() };
        let mut served = Served { daemon: Daemon::start(&program).unwrap(), dir: tempfile::tempdir().unwrap() };
        let listener = UnixListener::bind(served.socket()).unwrap();
        served.ok("getfd", json!({ "fdname": "nbd" }), Some(&listener));
        let addr = json!({ "type": "fd", "data": { "str": "nbd" } });
        served.ok("nbd-server-start", json!({ "addr": addr, "max-connections": 0 }), None::<&File>);
        served
    }

    fn ok(&mut self, command: &str, arguments: Value, fd: Option<impl AsFd>) -> Value {
        let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
        self.daemon.execute(command, arguments, &fds).unwrap()
    }

    /// Serves a disk of its own of so many bytes as export `name`; it is in the page cache.
    pub fn export(&mut self, name: &str, size: usize) {
        let path = self.dir.path().join(name);
        std::fs::write(&path, vec![0x5a; size]).unwrap();
        let disk = File::options().read(true).write(true).open(path).unwrap();
        let set = self.ok("add-fd", json!({}), Some(&disk))["fdset-id"].as_i64().unwrap();
        let file = json!({ "driver": "file", "filename": format!("/dev/fdset/{set}") });
        let node = json!({ "driver": "raw", "node-name": name, "file": file });
        self.ok("blockdev-add", node, None::<&File>);
        let export = json!({ "type": "nbd", "id": name, "node-name": name, "writable": true });
        self.ok("block-export-add", export, None::<&File>);
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }

    /// A client of export `name`, with simple replies.
    pub fn client(&self, name: &str) -> Client {
        let mut socket = UnixStream::connect(self.socket()).unwrap();
        socket.read_exact(&mut [0; 18]).unwrap();
        let (option, len) = (1u32.to_be_bytes(), u32::try_from(name.len()).unwrap().to_be_bytes());
        socket.write_all(&[&3u32.to_be_bytes()[..], b"IHAVEOPT", &option, &len, name.as_bytes()].concat()).unwrap();
        let mut answer = [0; 10];
        socket.read_exact(&mut answer).unwrap();
        let size = u64::from_be_bytes(answer[..8].try_into().unwrap());
        Client { socket, size, random: name.len() as u64 + 88_172_645_463_325_252 }
    }

    /// CPU time of all its threads so far, nanoseconds.
    pub fn cpu(&self) -> u64 {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.daemon.pid())).unwrap();
        let of = |path: PathBuf| {
            // A thread may end meanwhile.
            let text = std::fs::read_to_string(path.join("schedstat")).ok()?;
            text.split(' ').next()?.parse::<u64>().ok()
        };
        tasks.filter_map(|task| of(task.ok()?.path())).sum()
    }

    /// Resident memory, KiB.
    pub fn resident(&self) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.daemon.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    pub fn stop(self) {
        self.daemon.stop().unwrap();
    }
}

/// A client at work.
pub struct Client {
    pub socket: UnixStream,
    size: u64,
    random: u64,
}

impl Client {
    /// Requests for random blocks.
    pub fn requests(&mut self, count: usize, len: u32) -> Vec<u8> {
        let mut requests = Vec::with_capacity(28 * count);
        for _ in 0..count {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            let places = (self.size - u64::from(len)) / BLOCK as u64 + 1;
            let offset = (self.random >> 16) % places * BLOCK as u64;
            requests.extend_from_slice(&0x2560_9513u32.to_be_bytes());
            requests.extend_from_slice(&[0; 12]);
            requests.extend_from_slice(&offset.to_be_bytes());
            requests.extend_from_slice(&len.to_be_bytes());
        }
        requests
    }

    /// Asks for `count` blocks at once and takes all answers.
    pub fn read(&mut self, count: usize, replies: &mut Vec<u8>) {
        let requests = self.requests(count, BLOCK.try_into().unwrap());
        self.socket.write_all(&requests).unwrap();
        replies.resize((HEADER + BLOCK) * count, 0);
        self.socket.read_exact(replies).unwrap();
        for reply in replies.chunks(HEADER + BLOCK) {
            assert!(reply[..8] == [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0] && reply[HEADER] == 0x5a, "a wrong answer");
        }
    }
}
