// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bait for a confined process that tries to get out: real files, descriptors and listeners, laid out by the one who may open.

use std::ffi::CString;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::PathBuf;

use rustix::fs::MemfdFlags;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};
use serde_json::{Value, json};
use sys::spawn::{self, Launch};

use crate::inspector::Program;
use crate::{Error, Result};

/// What a process is to give up before it tries.
#[derive(Clone, Debug, Default)]
pub struct Weakness {
    /// No layers but these; all if `None`.
    pub only: Option<Vec<String>>,
    /// Layers to leave out.
    pub without: Vec<String>,
    /// A system call that the filter is to let through.
    pub hole: Option<String>,
}

/// The bait. It goes with the value.
#[derive(Debug)]
pub struct Trap {
    directory: PathBuf,
    /// What the process is given to read, and how it calls it.
    descriptors: Vec<(&'static str, OwnedFd)>,
    abstract_name: String,
    port: u16,
    /// Nobody answers, but the kernel lets connect who reaches them.
    _listeners: (UnixListener, UnixListener, TcpListener),
}

impl Trap {
    /// Lays it out in a new directory in `$TMPDIR`.
    ///
    /// # Errors
    /// One of the baits cannot be made.
    pub fn set() -> Result<Trap> {
        Trap::make().map_err(Error::process("could not lay out what a confined process may try to reach"))
    }

    fn make() -> io::Result<Trap> {
        let directory = std::env::temp_dir().join(format!("doorless-attest-{}", std::process::id()));
        DirBuilder::new().mode(0o700).create(&directory)?;
        let undo = Undo(Some(&directory));
        let image = directory.join("image.raw");
        // Executable, so that running it is denied by nothing but a layer.
        File::options().write(true).create_new(true).mode(0o700).open(&image)?.set_len(4096)?;
        let memory = rustix::fs::memfd_create("doorless-attest", MemfdFlags::CLOEXEC)?;
        let memory = File::open(format!("/proc/self/fd/{}", memory.as_raw_fd()))?;
        let descriptors: Vec<(&str, OwnedFd)> = vec![
            ("an image that was passed read-only", File::open(&image)?.into()),
            ("a memfd that was passed read-only", memory.into()),
            ("a directory that was passed", File::open(&directory)?.into()),
        ];
        for (_, fd) in &descriptors {
            fcntl_setfd(fd, FdFlags::empty())?;
        }
        let abstract_name = format!("doorless-attest-{}", std::process::id());
        let by_path = UnixListener::bind(directory.join("socket"))?;
        let by_name = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&abstract_name)?)?;
        let tcp = TcpListener::bind("127.0.0.1:0")?;
        let port = tcp.local_addr()?.port();
        undo.not();
        Ok(Trap { directory, descriptors, abstract_name, port, _listeners: (by_path, by_name, tcp) })
    }

    /// Starts a process that confines itself at the level of `program`, but for what `weakness` takes away, and tries every way
    /// out: the layers of its confinement and its attempts.
    ///
    /// # Errors
    /// It cannot be started, or has no answer: then it has said why on standard error.
    pub fn spring(&self, program: &Program, level: &str, weakness: &Weakness) -> Result<Value> {
        let doing = "could not run the process that tries to get out";
        let descriptors: Vec<(&str, i32)> =
            self.descriptors.iter().map(|(called, fd)| (*called, fd.as_raw_fd())).collect();
        let orders = json!({
            "confine": level, "only": weakness.only, "without": weakness.without, "hole": weakness.hole,
            "path": self.directory.join("image.raw"), "descriptors": descriptors, "process": std::process::id(),
            "socket": self.directory.join("socket"), "abstract_socket": self.abstract_name, "port": self.port,
        });
        let wanted = |layer: &str| {
            let named = weakness.only.as_ref().is_none_or(|only| only.iter().any(|name| name == layer));
            named && !weakness.without.iter().any(|name| name == layer)
        };
        let said = self.start(program, &orders, wanted("pid-namespace")).map_err(Error::process(doing))?;
        serde_json::from_slice(&said).map_err(|_| {
            Error::Refused("the process that tries to get out ended without an answer; its own message says why".into())
        })
    }

    fn start(&self, program: &Program, orders: &Value, alone: bool) -> io::Result<Vec<u8>> {
        let nothing = File::open("/dev/null")?;
        let (answer, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
        let arguments = vec![CString::new("attest-inside")?, CString::new(orders.to_string())?];
        let mut child = spawn::start(&Launch {
            program: program.executable.as_os_str(),
            arguments,
            stdin: nothing.as_fd(),
            stdout: theirs.as_fd(),
            own_group: false,
            alone,
        })?;
        drop(theirs);
        let mut said = Vec::new();
        let read = File::from(answer).read_to_end(&mut said);
        child.wait()?;
        read?;
        Ok(said)
    }
}

impl Drop for Trap {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Removes a directory of which no value has become.
struct Undo<'a>(Option<&'a PathBuf>);

impl Undo<'_> {
    fn not(mut self) {
        self.0 = None;
    }
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if let Some(directory) = self.0 {
            let _ = fs::remove_dir_all(directory);
        }
    }
}
