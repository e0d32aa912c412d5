// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the command line names on the host, opened while the process still can.
//!
//! This is the only place in the daemon that opens anything, and it is over before the process is confined. Over the monitor
//! a path is always refused.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, poll};
use serde_json::{Map, Value, json};

use crate::monitor::Source;
use crate::state::Daemon;

/// Sets that the daemon makes for files named on its command line start here: out of the way of users' numbers, and low
/// enough for `/dev/fdset/N` (2^31-1 is the last that can be named).
const FIRST_OWN_SET: i64 = 1 << 30;

/// The files of a TLS server's credentials, named as QEMU names them.
const CREDENTIALS: [&str; 4] = ["ca-cert.pem", "ca-crl.pem", "server-cert.pem", "server-key.pem"];

/// Character devices by id.
#[derive(Debug, Default)]
pub struct Chardevs {
    sources: BTreeMap<String, Source>,
    bound: Vec<PathBuf>,
}

impl Chardevs {
    /// Makes one from checked `ChardevOptions`.
    ///
    /// # Errors
    /// A sentence for the user.
    pub fn add(&mut self, options: &Value) -> Result<(), String> {
        let id = options["id"].as_str().unwrap_or_default().to_owned();
        let server = options["server"].as_bool().unwrap_or(false);
        let wait = options["wait"].as_bool().unwrap_or(true);
        let socket = match (options["fd"].as_str(), options["path"].as_str()) {
            (Some(fd), None) => inherited(fd)?,
            (None, Some(path)) if server => listen(path, &mut self.bound)?,
            (None, Some(path)) => {
                UnixStream::connect(path).map_err(|e| format!("Failed to connect to '{path}': {e}"))?.into()
            }
            _ => return Err("exactly one of 'fd' and 'path' must be given".into()),
        };
        if server && wait {
            // The client stays in the listener's queue until the monitor takes it in.
            poll(&mut [PollFd::new(&socket, PollFlags::IN)], None)
                .map_err(|e| format!("Failed to wait for a client: {e}"))?;
        }
        if self.sources.contains_key(&id) {
            return Err(format!("Duplicate ID '{id}' for chardev"));
        }
        self.sources.insert(id, if server { Source::Listener(socket) } else { Source::Connected(socket) });
        Ok(())
    }

    /// The device called `id`, for a monitor.
    pub fn take(&mut self, id: &str) -> Option<Source> {
        self.sources.remove(id)
    }

    /// A device that no monitor took.
    pub fn unused(&self) -> Option<&str> {
        self.sources.keys().next().map(String::as_str)
    }

    /// Files of the sockets that were made.
    pub fn bound(self) -> Vec<PathBuf> {
        self.bound
    }
}

/// Descriptors on their way into fd sets and under names.
#[derive(Debug, Default)]
pub struct Openings {
    sets: Vec<(i64, OwnedFd, Option<String>)>,
    named: Vec<(String, OwnedFd)>,
    inherited: BTreeMap<i64, OwnedFd>,
    bound: Vec<PathBuf>,
    own_sets: i64,
}

impl Openings {
    /// `--add-fd`, with QEMU's checks.
    ///
    /// # Errors
    /// QEMU's words.
    pub fn add_fd(&mut self, options: &Value) -> Result<(), String> {
        let number = given_number(options, "fd")?.ok_or("fd option is required and must be non-negative")?;
        if number <= 2 {
            return Err("fd cannot be a standard I/O stream".into());
        }
        // One number may go into several sets.
        let fd = match self.inherited.get(&number) {
            Some(fd) => fd.try_clone(),
            None => i32::try_from(number)
                .map_err(|_| io::ErrorKind::NotFound.into())
                .and_then(sys::fd::inherited)
                .and_then(|fd| fd.try_clone().inspect(|_| drop(self.inherited.insert(number, fd)))),
        };
        let fd = fd.map_err(|_| "fd is not valid or already in use")?;
        let set = given_number(options, "set")?.ok_or("set option is required and must be non-negative")?;
        self.sets.push((set, fd, options["opaque"].as_str().map(str::to_owned)));
        Ok(())
    }

    /// Opens the files that `BlockdevOptions` name, at any depth, and lets the options name sets instead.
    ///
    /// # Errors
    /// A sentence for the user.
    pub fn open_files(&mut self, options: &mut Value, read_only: bool, direct: bool) -> Result<(), String> {
        let Value::Object(options) = options else { return Ok(()) };
        let read_only = options.get("read-only").and_then(Value::as_bool).unwrap_or(read_only);
        let cache = options.get("cache").and_then(|cache| cache.get("direct"));
        let direct = cache.and_then(Value::as_bool).unwrap_or(direct);
        if let Some(Value::String(filename)) = options.get_mut("filename")
            && !filename.starts_with(fdset::PREFIX)
        {
            let file = OpenOptions::new()
                .read(true)
                .write(!read_only)
                .custom_flags(if direct { rustix::fs::OFlags::DIRECT.bits().cast_signed() } else { 0 })
                .open(&*filename);
            let file = file.map_err(|e| format!("Could not open '{filename}': {e}"))?;
            let set = FIRST_OWN_SET + self.own_sets;
            self.own_sets += 1;
            self.sets.push((set, file.into(), Some(filename.clone())));
            *filename = format!("{}{set}", fdset::PREFIX);
        }
        for (key, child) in options.iter_mut().filter(|(_, child)| child.is_object()) {
            self.open_files(child, read_only || key == "backing", direct)?;
        }
        Ok(())
    }

    /// Opens the files of the directory that a `tls-creds-x509` object names, and lets it name a set instead.
    ///
    /// # Errors
    /// A sentence for the user.
    pub fn open_credentials(&mut self, object: &mut Value) -> Result<(), String> {
        let dir = match object.get("dir").and_then(Value::as_str) {
            Some(dir) if !dir.starts_with(fdset::PREFIX) => dir.to_owned(),
            _ => return Ok(()),
        };
        let set = FIRST_OWN_SET + self.own_sets;
        self.own_sets += 1;
        for name in CREDENTIALS {
            match std::fs::File::open(std::path::Path::new(&dir).join(name)) {
                Ok(file) => self.sets.push((set, file.into(), Some(name.to_owned()))),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(format!("Could not open '{dir}/{name}': {e}")),
            }
        }
        object["dir"] = format!("{}{set}", fdset::PREFIX).into();
        Ok(())
    }

    /// Opens the file that a `secret` object names, and lets it name a set instead. A secret itself has no place on a command
    /// line, which every user of the machine can read.
    ///
    /// # Errors
    /// A sentence for the user.
    pub fn open_secret(&mut self, object: &mut Value) -> Result<(), String> {
        if object["qom-type"] != "secret" {
            return Ok(());
        }
        if object.get("data").is_some() {
            return Err("a command line is no secret: give 'file', or add the object over the monitor".into());
        }
        let Some(path) = object["file"].as_str().filter(|path| !path.starts_with(fdset::PREFIX)) else { return Ok(()) };
        let file = std::fs::File::open(path).map_err(|e| format!("Could not open '{path}': {e}"))?;
        let set = FIRST_OWN_SET + self.own_sets;
        self.own_sets += 1;
        self.sets.push((set, file.into(), Some(path.to_owned())));
        object["file"] = format!("{}{set}", fdset::PREFIX).into();
        Ok(())
    }

    /// A server's option: the socket, and the arguments of its starting command that name it, as `name`.
    ///
    /// # Errors
    /// A sentence for the user.
    pub fn server(&mut self, options: Value, name: &str) -> Result<Value, String> {
        let Value::Object(mut options) = options else { return Err("not an object".into()) };
        let address = options.remove("addr").unwrap_or_default();
        let socket = match (address["str"].as_str(), address["path"].as_str()) {
            (Some(fd), _) => inherited(fd)?,
            (None, Some(path)) => listen(path, &mut self.bound)?,
            (None, None) => {
                let text = |key: &str| address[key].as_str().unwrap_or_default();
                let (host, port) = (text("host"), text("port"));
                let number: u16 = port.parse().map_err(|_| format!("'{port}' is not the number of a port"))?;
                let listener = TcpListener::bind((host, number));
                listener.map_err(|e| format!("Failed to listen on {host}:{port}: {e}"))?.into()
            }
        };
        self.named.push((name.into(), socket));
        options.insert("addr".into(), json!({ "type": "fd", "data": { "str": name } }));
        Ok(Value::Object(Map::from_iter(options)))
    }

    /// `--export`: the socket of one that has its own, and a name for it in its place.
    ///
    /// # Errors
    /// A sentence for the user.
    pub fn export(&mut self, options: &mut Value) -> Result<(), String> {
        let name = format!("command-line-export-{}", options["id"].as_str().unwrap_or_default());
        if let Some(device) = options["fd"].as_str() {
            let device = inherited(device)?;
            options["fd"] = name.as_str().into();
            self.named.push((name, device));
            return Ok(());
        }
        let address = &options["addr"];
        let socket = match (address["str"].as_str(), address["path"].as_str()) {
            (Some(fd), _) => inherited(fd)?,
            (None, Some(path)) => listen(path, &mut self.bound)?,
            (None, None) => return Ok(()),
        };
        options["addr"] = json!({ "type": "fd", "str": name });
        self.named.push((name, socket));
        Ok(())
    }

    /// Files of the sockets that were made.
    pub fn bound(&self) -> &[PathBuf] {
        &self.bound
    }

    /// Gives everything to the daemon.
    ///
    /// # Errors
    /// A set refuses a descriptor.
    pub fn hand_over(self, daemon: &mut Daemon) -> Result<(), qmp::Error> {
        for (set, fd, opaque) in self.sets {
            daemon.add_fd(fd, Some(set), opaque)?;
        }
        for (name, fd) in self.named {
            daemon.named_fds().add(&name, fd)?;
        }
        Ok(())
    }
}

/// A number that is not negative, decimal or with 0x.
fn given_number(options: &Value, key: &str) -> Result<Option<i64>, String> {
    let Some(text) = options[key].as_str() else { return Ok(None) };
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => i64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    let number = parsed.map_err(|_| format!("Parameter '{key}' expects a number"))?;
    Ok(Some(number).filter(|&number| number >= 0))
}

fn inherited(number: &str) -> Result<OwnedFd, String> {
    let parsed: i32 = number.parse().map_err(|_| format!("'{number}' is not the number of a descriptor"))?;
    let fd = if parsed == 0 { sys::fd::standard_input() } else { sys::fd::inherited(parsed) };
    fd.map_err(|e| format!("File descriptor {number} was not passed to this process: {e}"))
}

/// Binds, listens and notes the file; a socket that is there is replaced, as QEMU does.
fn listen(path: &str, bound: &mut Vec<PathBuf>) -> Result<OwnedFd, String> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if std::os::unix::fs::FileTypeExt::is_socket(&metadata.file_type()) => {
            std::fs::remove_file(path).map_err(|e| format!("Failed to unlink socket {path}: {e}"))?;
        }
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(|e| format!("Failed to bind socket to {path}: {e}"))?;
    bound.push(path.into());
    Ok(listener.into())
}
