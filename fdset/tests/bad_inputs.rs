// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Descriptors that nobody should pass, and what becomes of them under each policy.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::fd::OwnedFd;

use fdset::audit::{Finding, findings};
use fdset::{Access, Device, Error, FdPolicy, FdSets, Kind, Limit, Peer, Provenance, Quotas, Refusal, Role, Settings};
use rustix::fs::{CWD, Mode, OFlags, SealFlags, openat};
use rustix::io::Errno;
use support::{Image, again, memfd};

fn strict() -> FdSets {
    FdSets::with(Settings { policy: FdPolicy::Strict, ..Settings::default() })
}

fn opened(path: &str, flags: OFlags) -> OwnedFd {
    openat(CWD, path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

/// Strict refuses `fd` for `reason` and names it in full, compat takes it.
#[track_caller]
fn refused(fd: OwnedFd, reason: Refusal) {
    FdSets::new().add(fd.try_clone().unwrap(), None, None).unwrap();
    let sets = strict();
    let error = sets.add(fd, None, None).unwrap_err();
    let Error::Refused(refused) = &error else { panic!("{error}") };
    assert_eq!(refused.reason, reason);
    assert_eq!(error.to_string(), format!("Refused to add fd={}: it {reason}", refused.fd));
    assert_eq!(error.errno(), Errno::PERM.raw_os_error());
    let detail = error.detail();
    for part in [&format!("inode {}", refused.identity.inode), &refused.rights.to_string(), &reason.to_string()] {
        assert!(detail.contains(part), "{detail}");
    }
    assert_eq!(sets.list().len(), 0);
}

#[track_caller]
fn taken(sets: &FdSets, fd: OwnedFd) -> i64 {
    sets.add(fd, None, None).unwrap().set_id
}

#[test]
fn bad_input_1_directory_is_refused() {
    refused(opened("/proc", OFlags::RDONLY | OFlags::DIRECTORY), Refusal::Directory);
}

#[test]
fn bad_input_2_pipe_is_refused() {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    refused(reader, Refusal::Fifo);
    refused(writer, Refusal::Fifo);
}

#[test]
fn bad_input_3_socket_is_refused_as_a_disk_and_taken_as_a_socket() {
    let (socket, other) = std::os::unix::net::UnixStream::pair().unwrap();
    refused(socket.into(), Refusal::Socket);
    let provenance = Provenance { role: Role::Socket, ..Provenance::default() };
    let sets = strict();
    sets.add_from(other.into(), None, None, provenance).unwrap();
    let error = sets.add_from(Image::new().read_write(), None, None, provenance).unwrap_err();
    assert!(matches!(error, Error::Refused(refused) if refused.reason == Refusal::NotTheRole));
}

#[test]
fn bad_input_4_terminal_is_refused() {
    match openat(CWD, "/dev/ptmx", OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(terminal) => refused(terminal, Refusal::Terminal),
        Err(_) => support::skip("bad_input_4_terminal_is_refused", "/dev/ptmx"),
    }
}

#[test]
fn bad_input_5_character_device_is_refused() {
    refused(opened("/dev/null", OFlags::RDWR), Refusal::CharDevice);
    refused(opened("/dev/zero", OFlags::RDONLY), Refusal::CharDevice);
}

#[test]
fn bad_input_6_kernel_log_is_refused_whatever_the_role() {
    let test = "bad_input_6_kernel_log_is_refused_whatever_the_role";
    let Ok(log) = openat(CWD, "/dev/kmsg", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()) else {
        return support::skip(test, "the right to open /dev/kmsg");
    };
    refused(log.try_clone().unwrap(), Refusal::MemoryDevice);
    let provenance = Provenance { role: Role::Device(Device { major: 1, minor: 11 }), ..Provenance::default() };
    let error = strict().add_from(log, None, None, provenance).unwrap_err();
    assert!(matches!(error, Error::Refused(refused) if refused.reason == Refusal::MemoryDevice));
}

#[test]
fn bad_input_7_device_is_taken_in_its_own_role_only() {
    let sets = strict();
    let role = |minor| Provenance { role: Role::Device(Device { major: 1, minor }), ..Provenance::default() };
    sets.add_from(opened("/dev/null", OFlags::RDWR), None, None, role(3)).unwrap();
    let error = sets.add_from(opened("/dev/null", OFlags::RDWR), None, None, role(5)).unwrap_err();
    assert!(matches!(error, Error::Refused(refused) if refused.reason == Refusal::NotTheRole));
}

#[test]
fn bad_input_8_path_only_descriptor_is_refused() {
    refused(Image::new().open(OFlags::PATH), Refusal::PathOnly);
    refused(opened("/proc/self/exe", OFlags::PATH | OFlags::NOFOLLOW), Refusal::PathOnly);
}

#[test]
fn bad_input_9_appending_writer_is_refused_and_appending_reader_taken() {
    let image = Image::new();
    refused(image.open(OFlags::RDWR | OFlags::APPEND), Refusal::AppendForWriting);
    refused(image.open(OFlags::WRONLY | OFlags::APPEND), Refusal::AppendForWriting);
    taken(&strict(), image.open(OFlags::RDONLY | OFlags::APPEND));
}

#[test]
fn bad_input_10_write_only_descriptor_is_taken_and_never_picked_for_reading() {
    let sets = strict();
    let id = taken(&sets, Image::new().open(OFlags::WRONLY));
    for access in [Access::READ_ONLY, Access::READ_WRITE] {
        assert!(matches!(sets.open(id, access).unwrap_err(), Error::NoMatch { .. }));
    }
    sets.open(id, Access::WRITE_ONLY).unwrap();
}

#[test]
fn bad_input_11_unsealed_memfd_is_refused_read_only() {
    let writable = memfd(SealFlags::empty());
    refused(again(&writable, OFlags::RDONLY), Refusal::UnsealedMemfd);
    taken(&strict(), writable);
}

#[test]
fn bad_input_11_sealed_memfd_is_taken_read_only() {
    for seals in [SealFlags::WRITE, SealFlags::FUTURE_WRITE] {
        let sets = strict();
        let sealed = memfd(seals | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL);
        let id = taken(&sets, again(&sealed, OFlags::RDONLY));
        sets.open(id, Access::READ_ONLY).unwrap();
    }
}

#[test]
fn bad_input_12_memfd_sealed_against_writing_is_refused_for_writing() {
    refused(memfd(SealFlags::WRITE | SealFlags::SHRINK), Refusal::SealedMemfd);
    refused(memfd(SealFlags::FUTURE_WRITE), Refusal::SealedMemfd);
}

#[test]
fn bad_input_13_memfd_that_may_shrink_is_refused_read_only() {
    let sealed = memfd(SealFlags::WRITE);
    refused(again(&sealed, OFlags::RDONLY), Refusal::ShrinkableMemfd);
}

#[test]
fn bad_input_14_unlinked_file_is_taken_and_shown_deleted() {
    let (image, sets) = (Image::new(), strict());
    let id = taken(&sets, image.read_write());
    let deleted = |id| sets.set(id).unwrap().fds().next().unwrap().identity().unwrap().deleted;
    assert!(!deleted(id));
    drop(image);
    sets.refresh();
    assert!(deleted(id));
    let unnamed = openat(CWD, std::env::temp_dir(), OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR);
    match unnamed {
        Ok(fd) => assert!(deleted(taken(&sets, fd))),
        Err(_) => support::skip("bad_input_14_unlinked_file_is_taken_and_shown_deleted", "O_TMPFILE"),
    }
}

#[test]
fn bad_input_14_unlinked_file_of_a_tmpfs_is_no_memfd() {
    let test = "bad_input_14_unlinked_file_of_a_tmpfs_is_no_memfd";
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let Ok(file) = openat(CWD, "/dev/shm", flags, Mode::RUSR) else {
        return support::skip(test, "a tmpfs at /dev/shm");
    };
    let sets = strict();
    let id = taken(&sets, again(&file, OFlags::RDONLY));
    assert_eq!(sets.set(id).unwrap().fds().next().unwrap().identity().unwrap().seals, None);
}

#[test]
fn bad_input_15_nonblocking_descriptor_is_opened_with_its_flag_untouched() {
    let (image, sets) = (Image::new(), strict());
    let client = image.open(OFlags::RDONLY | OFlags::NONBLOCK);
    let id = taken(&sets, client.try_clone().unwrap());
    let dup = sets.open(id, Access::READ_ONLY).unwrap();
    assert!(rustix::fs::fcntl_getfl(&client).unwrap().contains(OFlags::NONBLOCK));
    assert_eq!(rustix::io::pread(&dup, &mut [0; 512], 0).unwrap(), 512);
}

#[test]
fn bad_input_16_direct_must_agree_both_ways() {
    let (image, sets) = (Image::new(), strict());
    let Some(direct) = image.direct(OFlags::RDWR, "bad_input_16_direct_must_agree_both_ways") else { return };
    let id = taken(&sets, direct);
    let text = sets.open(id, Access::READ_WRITE).unwrap_err().to_string();
    assert_eq!(text, "Failed to find file descriptor with matching flags=0x2");
    sets.open(id, Access::READ_WRITE.direct()).unwrap();
    let plain = taken(&sets, image.read_write());
    let error = sets.open(plain, Access::READ_WRITE.direct()).unwrap_err();
    let flags = Access::READ_WRITE.direct().open_flags();
    assert_eq!(error.to_string(), format!("Failed to find file descriptor with matching flags={flags:#x}"));
}

#[test]
fn bad_input_17_sync_descriptor_is_refused_or_of_no_use() {
    let image = Image::new();
    for sync in [OFlags::SYNC, OFlags::from_bits_retain(OFlags::SYNC.bits() & !0x10_0000)] {
        refused(image.open(OFlags::RDWR | sync), Refusal::Sync);
        let sets = FdSets::new();
        let added = sets.add(image.open(OFlags::RDWR | sync), None, None).unwrap();
        let error = sets.open(added.set_id, Access::READ_WRITE).unwrap_err();
        assert_eq!(error.to_string(), format!("Failed to dup() given file descriptor fd={}", added.fd));
        assert_eq!(error.errno(), Errno::INVAL.raw_os_error());
        sets.open(added.set_id, Access::from_open_flags((OFlags::RDWR | sync).bits())).unwrap();
    }
}

#[test]
fn bad_input_18_read_only_file_of_the_workers_own_user_is_found_weak() {
    let (image, sets) = (Image::new(), strict());
    let added = sets.add(image.read_only(), None, None).unwrap();
    let listed: Vec<_> = sets.list().collect();
    let owner = *listed[0].fds().next().unwrap().identity().unwrap();
    let weak = Finding::Reopenable((added.set_id, added.fd));
    assert_eq!(findings(&listed, owner.uid, owner.gid), [weak]);
    assert_eq!(findings(&listed, owner.uid + 1, owner.gid + 1), []);
}

#[test]
fn bad_input_19_file_that_one_set_reads_and_another_writes_is_found() {
    let (image, sets) = (Image::new(), strict());
    let reader = sets.add(image.read_only(), Some(0), None).unwrap();
    let same_set = sets.add(image.read_write(), Some(0), None).unwrap();
    let nobody = |sets: &FdSets| findings(&sets.list().collect::<Vec<_>>(), u32::MAX, u32::MAX);
    assert_eq!(nobody(&sets), [], "both in one set is what a set is for");
    sets.remove(0, Some(same_set.fd.into())).unwrap();
    let writer = sets.add(image.read_write(), Some(1), None).unwrap();
    let conflict = Finding::Conflicting { readers: vec![(0, reader.fd)], writers: vec![(1, writer.fd)] };
    assert_eq!(nobody(&sets), [conflict]);
}

#[test]
fn bad_input_20_set_full_of_one_file_meets_its_quota() {
    let quotas = Quotas { per_set: Some(2), per_peer: Some(3), total: Some(4) };
    let (image, sets) = (Image::new(), FdSets::with(Settings { quotas, ..Settings::default() }));
    let add = |set, uid: Option<u32>| {
        let peer = uid.map(|uid| Peer { pid: 42, uid });
        sets.add_from(image.read_only(), set, None, Provenance { peer, ..Provenance::default() })
    };
    let limit = |result: Result<fdset::Added, Error>| match result.unwrap_err() {
        Error::Quota { limit, allowed } => (limit, allowed),
        other => panic!("{other}"),
    };
    add(Some(7), Some(1000)).unwrap();
    add(Some(7), Some(1000)).unwrap();
    assert_eq!(limit(add(Some(7), None)), (Limit::Set(7), 2));
    add(None, Some(1000)).unwrap();
    assert_eq!(limit(add(None, Some(1000))), (Limit::Peer(Peer { pid: 42, uid: 1000 }), 3));
    add(None, None).unwrap();
    let error = add(None, Some(1001)).unwrap_err();
    assert_eq!(error.to_string(), "Too many file descriptors: this process may hold 4");
    assert_eq!(error.errno(), Errno::DQUOT.raw_os_error());
    assert_eq!(sets.list().len(), 3, "a refused descriptor makes no set");
    sets.remove(7, None).unwrap();
    add(Some(7), Some(1000)).unwrap();
}

#[test]
fn bad_input_21_shared_offset_is_neither_used_nor_moved() {
    let (image, sets) = (Image::new(), strict());
    let client = image.read_only();
    rustix::fs::seek(&client, rustix::fs::SeekFrom::Start(123)).unwrap();
    let id = taken(&sets, client.try_clone().unwrap());
    let _dup = sets.open(id, Access::READ_ONLY).unwrap();
    assert_eq!(rustix::fs::tell(&client).unwrap(), 123);
}

#[test]
fn bad_input_22_foreign_lock_holds_nothing_up() {
    let (image, sets) = (Image::new(), strict());
    let holder = image.read_write();
    rustix::fs::flock(&holder, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let id = taken(&sets, image.read_write());
    sets.open(id, Access::READ_WRITE).unwrap();
}

#[test]
fn bad_input_24_async_flag_is_left_to_its_owner() {
    let (image, sets) = (Image::new(), strict());
    let client = image.open(OFlags::RDWR | OFlags::from_bits_retain(0o20000));
    let before = rustix::fs::fcntl_getfl(&client).unwrap();
    let id = taken(&sets, client.try_clone().unwrap());
    sets.open(id, Access::READ_WRITE).unwrap();
    assert_eq!(rustix::fs::fcntl_getfl(&client).unwrap(), before);
}

#[test]
fn eventfd_is_refused() {
    refused(rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap(), Refusal::NotAFile);
}

#[test]
fn listing_tells_what_each_descriptor_is() {
    let (image, sets) = (Image::new(), strict());
    let peer = Some(Peer { pid: 7, uid: 1000 });
    let at = Some(std::time::SystemTime::UNIX_EPOCH);
    let provenance = Provenance { peer, at, ..Provenance::default() };
    let id = sets.add_from(image.read_only(), None, None, provenance).unwrap().set_id;
    let set = sets.set(id).unwrap();
    let fd = set.fds().next().unwrap();
    let stat = rustix::fs::fstat(image.read_only()).unwrap();
    let identity = fd.identity().unwrap();
    assert_eq!((identity.kind, identity.inode, identity.size), (Kind::Regular, stat.st_ino, Some(0x1_0000)));
    assert_eq!((fd.provenance(), fd.rights().mode()), (&provenance, fdset::Mode::ReadOnly));
}

#[test]
fn bad_input_44_set_in_use_is_emptied_and_its_user_works_on() {
    let (image, sets) = (Image::new(), strict());
    let id = taken(&sets, image.read_write());
    let dup = sets.open(id, Access::READ_WRITE).unwrap();
    sets.remove(id, None).unwrap();
    assert_eq!(rustix::io::pwrite(&dup, b"still here", 0).unwrap(), 10);
}

#[test]
fn bad_input_44_foreign_users_descriptor_stays_when_ownership_counts() {
    let (image, sets) = (Image::new(), strict());
    let peer = |uid| Peer { pid: 1, uid };
    let add = |peer| sets.add_from(image.read_only(), Some(0), None, Provenance { peer, ..Provenance::default() });
    let mine = add(Some(peer(1000))).unwrap().fd;
    let foreign = add(Some(peer(1001))).unwrap().fd;
    add(None).unwrap();
    let error = sets.remove_by(peer(1000), 0, None).unwrap_err();
    assert!(matches!(error, Error::NotYours { fd, .. } if fd == foreign), "{error}");
    assert_eq!(sets.len(), 3, "all or nothing");
    assert_eq!(sets.remove_by(Peer { pid: 2, uid: 1000 }, 0, Some(mine.into())).unwrap(), 1);
    assert_eq!(sets.remove(0, None).unwrap(), 2);
}

#[test]
fn bad_input_45_paths_that_look_like_a_set_open_what_qemu_opens() {
    let (image, sets) = (Image::new(), strict());
    sets.add(image.read_only(), Some(1), None).unwrap();
    sets.add(image.read_only(), Some(2), None).unwrap();
    for path in ["/dev/fdset/1", "/dev/fdset/01", "/dev/fdset/+1", "/dev/fdset/ 1"] {
        assert_eq!(sets.open_path(path, Access::READ_ONLY).unwrap().set_id(), 1, "{path}");
    }
    for path in ["/dev/fdset/1/../2", "/dev/fdset/", "/dev/fdset/0x1", "/dev/fdset/-1"] {
        let error = sets.open_path(path, Access::READ_ONLY).unwrap_err();
        assert_eq!(error.to_string(), format!("Could not parse fdset {path}"));
    }
}
