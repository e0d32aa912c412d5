// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A VMM that opens no disk itself: a manager passes descriptors over a socket, the VMM keeps them in fd sets, and its disks are
//! called `/dev/fdset/N`. Both ends are here, to be run: `cargo run -p fdset --example vmm -- disk.raw`.
//!
//! A line is a command as QMP has it, in short: `add-fd SET OPAQUE`, with the descriptor on its first byte; `disk PATH`.
#![allow(clippy::print_stdout, missing_docs)]

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use fdset::{Access, FdPolicy, FdSets, Quotas, Settings};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The VMM's end. What it must not do any more once it is confined, it does not do: there is no path here that it opens.
struct Vmm {
    socket: UnixStream,
    sets: FdSets,
    disks: Vec<Disk>,
}

/// A disk: the duplicate of a passed descriptor, which keeps its set alive.
struct Disk {
    path: String,
    file: File,
    _dup: fdset::Dup,
}

impl Vmm {
    fn new(socket: UnixStream) -> Vmm {
        let quotas = Quotas { per_set: Some(2), ..Quotas::default() };
        let settings = Settings { policy: FdPolicy::Strict, quotas, ..Settings::default() };
        Vmm { socket, sets: FdSets::with(settings), disks: Vec::new() }
    }

    /// Takes commands until the manager hangs up.
    fn run(&mut self) -> Result<()> {
        loop {
            let mut line = [0; 512];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC;
            let count = recvmsg(&self.socket, &mut [IoSliceMut::new(&mut line)], &mut ancillary, flags)?.bytes;
            let passed = ancillary.drain().find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                _ => None,
            });
            if count == 0 {
                return Ok(());
            }
            let answer = match self.obey(std::str::from_utf8(&line[..count])?.trim_end(), passed) {
                Ok(said) => said,
                Err(e) => format!("error: {e}"),
            };
            self.socket.write_all(format!("{answer}\n").as_bytes())?;
        }
    }

    fn obey(&mut self, line: &str, passed: Option<OwnedFd>) -> Result<String> {
        let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
        match command {
            "add-fd" => {
                let (set, opaque) = rest.split_once(' ').ok_or("add-fd SET OPAQUE")?;
                let added = self.sets.add(
                    passed.ok_or("no descriptor came with it")?,
                    Some(set.parse()?),
                    Some(opaque.into()),
                )?;
                Ok(format!("/dev/fdset/{}", added.set_id))
            }
            "disk" => {
                let dup = self.sets.open_path(rest, Access::READ_WRITE).map_err(|e| e.detail())?;
                let file = File::from(dup.as_fd().try_clone_to_owned()?);
                let sectors = file.metadata()?.len() / 512;
                self.disks.push(Disk { path: rest.to_owned(), file, _dup: dup });
                Ok(format!("{sectors} sectors"))
            }
            _ => Err("unknown command".into()),
        }
    }
}

/// The manager's end of one command.
fn ask(socket: &UnixStream, line: &str, fd: Option<&File>) -> Result<String> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    sendmsg(socket, &[IoSlice::new(line.as_bytes())], &mut control, SendFlags::NOSIGNAL)?;
    let mut answer = [0; 512];
    let count = io::Read::read(&mut &*socket, &mut answer)?;
    Ok(String::from_utf8_lossy(&answer[..count]).trim_end().to_owned())
}

/// Serves the image at `path` to a VMM as `/dev/fdset/1`; what was said.
fn demonstrate(path: &Path) -> Result<Vec<String>> {
    let (manager, vmm) = UnixStream::pair()?;
    let serving = std::thread::spawn(move || {
        let mut vmm = Vmm::new(vmm);
        vmm.run().map_err(|e| e.to_string())?;
        // The disk works on when the manager has gone and its own descriptors with it.
        let mut sector = [0; 512];
        for disk in &vmm.disks {
            disk.file.read_exact_at(&mut sector, 0).map_err(|e| format!("{}: {e}", disk.path))?;
        }
        Ok::<String, String>(format!("{} disks read", vmm.disks.len()))
    });
    let image = OpenOptions::new().read(true).write(true).open(path)?;
    let directory = File::open("/")?;
    let mut said = vec![
        // The opaque text is the manager's own record, which it finds again with query-fdsets: Kata's names block devices so.
        ask(&manager, "add-fd 1 kata-block:disk0:root\n", Some(&image))?,
        ask(&manager, "disk /dev/fdset/1\n", None)?,
        ask(&manager, "disk /dev/fdset/2\n", None)?,
        ask(&manager, "add-fd 3 a-directory\n", Some(&directory))?,
    ];
    drop((manager, image));
    said.push(serving.join().map_err(|_| "the VMM panicked")??);
    Ok(said)
}

fn main() -> Result<()> {
    let path = std::env::args_os().nth(1).ok_or("usage: vmm IMAGE")?;
    demonstrate(Path::new(&path))?.iter().for_each(|line| println!("{line}"));
    Ok(())
}

#[test]
fn the_vmm_serves_what_it_was_passed_and_refuses_the_rest() {
    let path = std::env::temp_dir().join(format!("fdset-vmm-{}", std::process::id()));
    std::fs::write(&path, [0; 4096]).expect("a file can be written");
    let said = demonstrate(&path).expect("all is answered");
    std::fs::remove_file(&path).expect("it is there");
    assert_eq!(said[..2], ["/dev/fdset/1", "8 sectors"]);
    assert!(said[2].contains("asked for set 2") && said[3].starts_with("error: "), "{said:?}");
    assert_eq!(said[4], "1 disks read");
}
