// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `doorless nbd` takes the place of `qemu-nbd`: its options do what they say, judged by libnbd and beside the original.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use harness::{DOORLESS, Scratch, judges, noise, run};

/// A server that was started in the foreground.
struct Server(Child);

impl Server {
    /// Starts `doorless nbd` and waits until `socket` takes clients.
    fn start(socket: &str, arguments: &[&str]) -> Server {
        let child = Command::new(DOORLESS).arg("nbd").args(["-k", socket]).args(arguments).spawn().unwrap();
        let server = Server(child);
        while !Path::new(socket).exists() {
            std::thread::yield_now();
        }
        server
    }

    fn wait(&mut self) -> ExitStatus {
        self.0.wait().unwrap()
    }

    fn terminate(mut self) -> ExitStatus {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.wait()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn disk(scratch: &Scratch) -> String {
    std::fs::write(scratch.path("disk.raw"), noise(1 << 20, 3)).unwrap();
    scratch.name("disk.raw")
}

fn uri(socket: &str, name: &str) -> String {
    manager::serve::uri(Path::new(socket), name)
}

/// What `doorless nbd` says about a command line that it does not carry out.
fn refused(arguments: &[&str]) -> String {
    let (status, _, errors) = harness::doorless(&[&["nbd"], arguments].concat());
    assert_eq!(status.code(), Some(1), "{arguments:?}: {errors}");
    errors
}

#[test]
fn without_persistent_it_ends_with_its_last_client_and_removes_its_socket() {
    let scratch = Scratch::new();
    let (disk, socket) = (disk(&scratch), scratch.name("socket"));
    let mut server = Server::start(&socket, &["-f", "raw", &disk]);
    // Looking in and leaving before an export is chosen does not count.
    UnixStream::connect(&socket).unwrap().read_exact(&mut [0; 18]).unwrap();
    if judges("without_persistent_it_ends_with_its_last_client_and_removes_its_socket", &["nbdcopy"]) {
        run("nbdcopy", &[&uri(&socket, ""), &scratch.name("copy")]);
        assert!(server.wait().success());
        assert!(!Path::new(&socket).exists());
        assert_eq!(std::fs::read(scratch.path("copy")).unwrap(), std::fs::read(&disk).unwrap());
    }
}

#[test]
fn persistent_it_serves_on_until_a_signal_and_leaves_nothing() {
    if !judges("persistent_it_serves_on_until_a_signal_and_leaves_nothing", &["nbdinfo"]) {
        return;
    }
    let scratch = Scratch::new();
    let (disk, socket, pid) = (disk(&scratch), scratch.name("socket"), scratch.name("pid"));
    let server = Server::start(&socket, &["-rt", "-fraw", "-e4", &format!("--pid-file={pid}"), &disk]);
    // Written last: who waits for it need not wait for the socket.
    while !Path::new(&pid).exists() {
        std::thread::yield_now();
    }
    for _ in 0..2 {
        assert_eq!(run("nbdinfo", &["--size", &uri(&socket, "")]).trim(), "1048576");
    }
    assert_eq!(std::fs::read_to_string(&pid).unwrap().trim(), server.0.id().to_string());
    assert!(server.terminate().success());
    assert!(!Path::new(&socket).exists() && !Path::new(&pid).exists());
}

#[test]
fn who_waits_for_the_socket_finds_the_disk() {
    let scratch = Scratch::new();
    let disk = disk(&scratch);
    for round in 0..20 {
        let socket = scratch.name(&format!("socket{round}"));
        let mut server = Server::start(&socket, &["-f", "raw", "-x", "it", &disk]);
        let mut client = UnixStream::connect(&socket).unwrap();
        let mut greeting = [0; 18];
        client.read_exact(&mut greeting).unwrap();
        // Flags, then NBD_OPT_EXPORT_NAME: a name that is not there is answered by hanging up.
        client.write_all(&[&[0, 0, 0, 3], &b"IHAVEOPT"[..], &[0, 0, 0, 1, 0, 0, 0, 2], b"it"].concat()).unwrap();
        let mut size = [0; 8];
        client.read_exact(&mut size).unwrap();
        assert_eq!(u64::from_be_bytes(size), 1 << 20, "round {round}");
        drop(client);
        assert!(server.wait().success());
    }
}

#[test]
fn a_failed_start_leaves_no_socket() {
    let scratch = Scratch::new();
    let (disk, socket) = (disk(&scratch), scratch.name("socket"));
    let long = "x".repeat(5000);
    let said = refused(&["-k", &socket, "-f", "raw", "-x", &long, &disk]);
    assert!(said.contains("too long"), "{said}");
    let names: Vec<_> = std::fs::read_dir(scratch.path(".")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["disk.raw"]);
}

#[test]
fn name_description_offset_and_rights_reach_the_client() {
    if !judges("name_description_offset_and_rights_reach_the_client", &["nbdinfo", "nbdcopy"]) {
        return;
    }
    let scratch = Scratch::new();
    let (disk, socket) = (disk(&scratch), scratch.name("socket"));
    let options = ["-t", "-r", "--format=raw", "-x", "its name", "-D", "for people", "-o", "64k", "-e", "0", &disk];
    let _server = Server::start(&socket, &options);
    let info = run("nbdinfo", &["--json", &uri(&socket, "its name")]);
    for told in ["\"is_read_only\": true", "\"export-size\": 983040", "for people"] {
        assert!(info.contains(told), "{told}: {info}");
    }
    run("nbdcopy", &[&uri(&socket, "its name"), &scratch.name("copy")]);
    assert_eq!(std::fs::read(scratch.path("copy")).unwrap(), std::fs::read(&disk).unwrap()[65536..]);
}

#[test]
fn a_dirty_bitmap_is_shown_as_qemu_nbd_shows_it() {
    if !judges("a_dirty_bitmap_is_shown_as_qemu_nbd_shows_it", &["qemu-nbd", "qemu-img", "qemu-io", "nbdinfo"]) {
        return;
    }
    let scratch = Scratch::new();
    let (base, image) = (scratch.name("base.qcow2"), scratch.name("image.qcow2"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", &base, "4M"]);
    run("qemu-img", &["bitmap", "--add", &base, "b"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write 1M 100k", "-c", "write 3M 64k", &base]);
    run("qemu-img", &["bitmap", "--disable", &base, "b"]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", &image]);
    for (options, image) in [(&["-r"][..], &base), (&["-r"], &image), (&["-A"], &image), (&["-s"], &base)] {
        let seen = ["qemu-nbd", DOORLESS].map(|program| {
            let socket = scratch.name(program.rsplit('/').next().unwrap());
            let verb: &[&str] = if program == DOORLESS { &["nbd"] } else { &[] };
            let arguments = [verb, &["-t", "-f", "qcow2", "-B", "b", "-k", &socket], options, &[image]].concat();
            let server = harness::Running::start(program, &arguments, &socket, rustix::process::Signal::TERM);
            let seen = run("nbdinfo", &["--map=qemu:dirty-bitmap:b", &uri(&socket, "")]);
            drop(server);
            seen
        });
        assert_eq!(seen[0], seen[1], "{options:?}");
        assert_eq!(seen[0].lines().filter(|line| line.contains("dirty")).count(), 2, "{}", seen[0]);
    }
    let error = refused(&["-r", "-f", "qcow2", "-B", "zz", "-k", &scratch.name("s"), &base]);
    assert!(error.contains("Bitmap 'zz' is not found"), "{error}");
}

#[test]
fn discards_reach_the_file_only_when_asked() {
    if !judges("discards_reach_the_file_only_when_asked", &["qemu-io"]) {
        return;
    }
    for (mode, content) in [("unmap", 0), ("ignore", 7)] {
        let scratch = Scratch::new();
        let socket = scratch.name("socket");
        std::fs::write(scratch.path("disk"), vec![7; 1 << 20]).unwrap();
        let mut server = Server::start(&socket, &["-f", "raw", "--discard", mode, &scratch.name("disk")]);
        let address = format!("nbd+unix:///?socket={socket}");
        run("qemu-io", &["-d", "unmap", "-f", "raw", "-c", "discard 0 512k", &address]);
        assert!(server.wait().success());
        assert_eq!(std::fs::read(scratch.path("disk")).unwrap()[0], content, "{mode}");
    }
}

#[test]
fn a_third_client_waits_until_one_of_two_leaves() {
    let scratch = Scratch::new();
    let (disk, socket) = (disk(&scratch), scratch.name("socket"));
    let _server = Server::start(&socket, &["-t", "-e", "2", "-f", "raw", &disk]);
    let connect = || UnixStream::connect(&socket).unwrap();
    let greeted = |mut client: UnixStream| {
        client.read_exact(&mut [0; 18]).unwrap();
        client
    };
    let (first, _second) = (greeted(connect()), greeted(connect()));
    let third = connect();
    third.set_nonblocking(true).unwrap();
    assert_eq!((&third).read(&mut [0; 18]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    third.set_nonblocking(false).unwrap();
    drop(first);
    greeted(third);
}

#[test]
fn fork_returns_when_clients_can_connect() {
    if !judges("fork_returns_when_clients_can_connect", &["nbdinfo"]) {
        return;
    }
    let scratch = Scratch::new();
    let (disk, socket, pid) = (disk(&scratch), scratch.name("socket"), scratch.name("pid"));
    run(DOORLESS, &["nbd", "--fork", "-t", "-k", &socket, "--pid-file", &pid, "-f", "raw", &disk]);
    assert_eq!(run("nbdinfo", &["--size", &uri(&socket, "")]).trim(), "1048576");
    let pid = std::fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    rustix::event::poll(&mut [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)], None).unwrap();
    assert!(!Path::new(&socket).exists());
    assert!(refused(&["--fork", "-k", &socket, "-f", "raw", "/none"]).contains("ended before it was ready"));
}

#[test]
fn it_serves_over_tcp() {
    if !judges("it_serves_over_tcp", &["nbdinfo"]) {
        return;
    }
    let scratch = Scratch::new();
    let disk = disk(&scratch);
    // A port that is free now; a test that lost the race would say so.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    run(DOORLESS, &["nbd", "--fork", "-b", "127.0.0.1", &format!("-p{port}"), "-f", "raw", &disk]);
    assert_eq!(run("nbdinfo", &["--size", &format!("nbd://127.0.0.1:{port}")]).trim(), "1048576");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    assert!(refused(&["-b", "127.0.0.1", "-p", &port, "-f", "raw", &disk]).contains("could not listen on 127.0.0.1:"));
}

#[test]
fn a_service_managers_socket_is_used_and_excludes_other_addresses() {
    if !judges("a_service_managers_socket_is_used_and_excludes_other_addresses", &["nbdinfo"]) {
        return;
    }
    let scratch = Scratch::new();
    let (disk, socket) = (disk(&scratch), scratch.name("socket"));
    let listener = OwnedFd::from(UnixListener::bind(&socket).unwrap());
    let activated = |arguments: &[&str]| {
        rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
        // The shell puts the socket where sd_listen_fds(3) wants it, and its own number is the program's.
        let script = format!("exec 3<&{}; export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$@\"", listener.as_raw_fd());
        let mut command = Command::new("sh");
        command.args(["-c", &script, "sh", DOORLESS, "nbd", "-f", "raw", &disk]).args(arguments);
        let child = command.stderr(Stdio::piped()).spawn().unwrap();
        rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::CLOEXEC).unwrap();
        child
    };
    let refused = activated(&["-k", "/elsewhere"]).wait_with_output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("Unix socket can't be set when using socket activation"), "{said}");
    // A client is there before the server, as when a service manager starts it for that client.
    let early = Command::new("nbdinfo").args(["--size", &uri(&socket, "")]).stdout(Stdio::piped()).spawn().unwrap();
    let mut server = Server(activated(&[]));
    let told = early.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(told.stdout).unwrap().trim(), "1048576");
    assert!(server.wait().success());
}

#[test]
fn under_the_name_of_qemu_nbd_a_client_sees_what_the_original_shows() {
    if !judges("under_the_name_of_qemu_nbd_a_client_sees_what_the_original_shows", &["qemu-nbd", "qemu-img", "nbdsh"]) {
        return;
    }
    let Some(python) = harness::python_with("under_the_name_of_qemu_nbd_a_client_sees_what_the_original_shows", "nbd")
    else {
        return;
    };
    let scratch = Scratch::new();
    let (disk, link) = (disk(&scratch), scratch.path("qemu-nbd"));
    std::os::unix::fs::symlink(DOORLESS, &link).unwrap();
    let ours = link.to_str().unwrap();
    assert!(run(ours, &["--version"]).starts_with("qemu-nbd (doorless) "));
    let look = "import nbd, sys\nh = nbd.NBD()\nh.connect_unix(sys.argv[1])\nprint(h.get_size(), h.is_read_only(), \
                h.can_multi_conn(), h.can_flush(), h.can_fua(), h.can_trim(), h.can_zero(), h.can_cache(), h.get_protocol())\n";
    for options in
        [&["-f", "raw"][..], &["-r", "-e", "3", "-f", "raw"], &["-f", "raw", "--discard=unmap", "--cache=writeback"]]
    {
        let seen = ["qemu-nbd", ours].map(|program| {
            let socket = scratch.name("socket");
            run(program, &[&["--fork", "-k", &socket], options, &[&disk]].concat());
            let seen = run(python, &["-c", look, &socket]);
            // Both end with their only client; the next one needs the path.
            while UnixStream::connect(&socket).is_ok() {
                std::thread::yield_now();
            }
            let _ = std::fs::remove_file(&socket);
            seen
        });
        assert_eq!(seen[0], seen[1], "{options:?}");
    }
    // What neither carries out ends with the same status.
    for wrong in [&["--zz"][..], &["-p", "x", &disk], &["/none"], &[&disk, &disk], &["--discard=zz", &disk], &[]] {
        let status = [Path::new("qemu-nbd"), &link].map(|program| {
            Command::new(program).args(wrong).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()
        });
        let codes = status.map(|status| status.unwrap().code());
        assert_eq!(codes, [Some(1), Some(1)], "{wrong:?}");
    }
}

#[test]
fn list_tells_what_the_original_tells() {
    if !judges("list_tells_what_the_original_tells", &["qemu-nbd", "nbdkit"]) {
        return;
    }
    let scratch = Scratch::new();
    let (disk, socket) = (disk(&scratch), scratch.name("s"));
    let compare = || {
        let theirs = Command::new("qemu-nbd").args(["--list", "-k", &socket]).output().unwrap();
        let (status, ours, errors) = harness::doorless(&["nbd", "--list", "-k", &socket]);
        assert!(status.success() && theirs.status.success(), "{errors}");
        // QEMU before 9 tells nothing of the headers' size, and asks for none of 64 bits.
        let without = |said: &str| -> Vec<String> {
            let kept =
                said.lines().filter(|line| !["transaction size", "flags"].iter().any(|what| line.contains(what)));
            kept.map(str::to_owned).collect()
        };
        let theirs = String::from_utf8(theirs.stdout).unwrap();
        assert_eq!(without(&ours), without(&theirs));
        assert!(ours == theirs || !theirs.contains("transaction size"), "{ours}\n{theirs}");
        ours
    };
    let server = Server::start(&socket, &["-t", "-r", "-f", "raw", "-A", "-x", "a name", "-D", "a text", &disk]);
    let said = compare();
    assert!(said.contains("'a name'") && said.contains("qemu:allocation-depth") && said.contains("readonly"), "{said}");
    assert!(server.terminate().success());
    let mut theirs = Command::new("nbdkit").args(["-f", "-U", &socket, "memory", "1M"]).spawn().unwrap();
    while UnixStream::connect(&socket).is_err() {
        std::thread::yield_now();
    }
    let said = compare();
    theirs.kill().unwrap();
    theirs.wait().unwrap();
    assert!(said.contains("size:  1048576"), "{said}");
    // Somebody who is no server.
    std::fs::remove_file(&socket).unwrap();
    let listener = UnixListener::bind(&socket).unwrap();
    let other =
        std::thread::spawn(move || listener.accept().unwrap().0.write_all(b"HTTP/1.1 400 Bad Request").unwrap());
    assert!(refused(&["-L", "-k", &socket]).contains("does not speak NBD"));
    other.join().unwrap();
    assert!(refused(&["-L", "-k", &scratch.name("none")]).contains("Failed to connect"));
    assert!(refused(&["-L", "-k", &socket, &disk]).contains("incompatible with a file name"));
}

#[test]
fn image_opts_name_the_image() {
    if !judges("image_opts_name_the_image", &["nbdinfo"]) {
        return;
    }
    let scratch = Scratch::new();
    let (disk, socket) = (disk(&scratch), scratch.name("s"));
    let server = Server::start(&socket, &["-t", "--image-opts", &format!("driver=raw,file.filename={disk}")]);
    assert_eq!(run("nbdinfo", &["--size", &uri(&socket, "")]).trim(), "1048576");
    assert!(server.terminate().success());
    assert!(refused(&["--image-opts", "driver=raw,file.filename=x,wings=2"]).contains("wings"));
    assert!(refused(&["--image-opts", "-f", "raw", "file.filename=x"]).contains("mutually exclusive"));
}

#[test]
fn what_is_not_built_is_refused_by_name() {
    let scratch = Scratch::new();
    let disk = disk(&scratch);
    for option in [
        "-lx",
        "--cache=directsync",
        "--cache=unsafe",
        "--aio=native",
        "--detect-zeroes=on",
        "--object=secret,id=s",
        "--tls-hostname=h",
        "-c/dev/nbd0",
        "-d",
    ] {
        let said = refused(&[option, &disk]);
        assert!(
            said.contains("is not supported") || said.contains("needs the kernel's nbd device"),
            "{option}: {said}"
        );
    }
    assert!(refused(&[]).contains("name one"));
    assert!(refused(&["-o", "9223372036854775807T", &disk]).contains("a number of bytes"));
    assert!(refused(&["-k", &scratch.name("s"), "-p", "1", &disk]).contains("has no address or port"));
    assert!(File::open(scratch.path("s")).is_err(), "nothing was made");
}
