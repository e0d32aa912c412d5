// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What QEMU 10.0.2 does, claim by claim, and where the sets differ on purpose.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::fd::{AsFd, AsRawFd};

use fdset::{Access, Dup, Error, FdSets, Settings};
use rustix::fs::OFlags;
use rustix::io::Errno;
use support::{Image, listing, numbers};

#[test]
fn new_sets_get_the_lowest_free_id() {
    let (image, sets) = (Image::new(), FdSets::new());
    let add = |set| sets.add(image.read_only(), set, None).unwrap().set_id;
    assert_eq!([add(None), add(None), add(Some(3)), add(None), add(None)], [0, 1, 3, 2, 4]);
    sets.remove(1, None).unwrap();
    assert_eq!(add(None), 1);
}

#[test]
fn ids_reach_to_the_end_of_int64() {
    let (image, sets) = (Image::new(), FdSets::new());
    sets.add(image.read_only(), Some(i64::MAX), None).unwrap();
    assert_eq!(sets.open(i64::MAX, Access::READ_ONLY).unwrap().set_id(), i64::MAX);
    let by_path = sets.open_path(&format!("/dev/fdset/{}", i64::MAX), Access::READ_ONLY);
    assert!(matches!(by_path.unwrap_err(), Error::BadPath { .. }));
    sets.remove(i64::MAX, None).unwrap();
    assert_eq!(sets.list().len(), 0);
}

#[test]
fn negative_id_is_refused_and_the_descriptor_closed() {
    let sets = FdSets::new();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let error = sets.add(writer, Some(-1), None).unwrap_err();
    assert_eq!(error.to_string(), "Parameter 'fdset-id' expects a non-negative value");
    assert_eq!(error.errno(), Errno::INVAL.raw_os_error());
    assert_eq!(rustix::io::read(&reader, &mut [0; 1]).unwrap(), 0, "end of file: the writer is closed");
}

#[test]
fn sets_are_listed_by_descending_id_and_descriptors_by_age() {
    let (image, sets) = (Image::new(), FdSets::new());
    let add = |set| sets.add(image.read_only(), Some(set), None).unwrap().fd;
    let (a, b, c, d, e) = (add(7), add(2), add(7), add(40), add(7));
    assert_eq!(listing(&sets), [(40, vec![d]), (7, vec![a, c, e]), (2, vec![b])]);
}

#[test]
fn opaque_text_is_kept_byte_for_byte() {
    let (image, sets) = (Image::new(), FdSets::new());
    for opaque in [None, Some(""), Some("a\0b \u{1f4be}")] {
        let id = sets.add(image.read_only(), None, opaque.map(str::to_owned)).unwrap().set_id;
        assert_eq!(sets.set(id).unwrap().fds().next().unwrap().opaque(), opaque);
    }
}

#[test]
fn same_file_may_be_added_any_number_of_times() {
    let (image, sets) = (Image::new(), FdSets::new());
    for set in [0, 0, 0, 1] {
        sets.add(image.read_only(), Some(set), None).unwrap();
    }
    assert_eq!(sets.len(), 4);
}

#[test]
fn removing_what_is_not_there_names_it_as_qemu_does() {
    let (image, sets) = (Image::new(), FdSets::new());
    let here = sets.add(image.read_only(), Some(1), None).unwrap();
    sets.add(image.read_only(), Some(2), None).unwrap();
    let dup = sets.open(1, Access::READ_ONLY).unwrap();
    let text = |set, fd| sets.remove(set, fd).unwrap_err().to_string();
    let fd = i64::from(here.fd);
    assert_eq!(text(5, None), "File descriptor named 'fdset-id:5' not found");
    assert_eq!(text(-5, None), "File descriptor named 'fdset-id:-5' not found");
    assert_eq!(text(5, Some(fd)), format!("File descriptor named 'fdset-id:5, fd:{fd}' not found"));
    assert_eq!(text(2, Some(fd)), format!("File descriptor named 'fdset-id:2, fd:{fd}' not found"));
    assert_eq!(text(1, Some(-1)), "File descriptor named 'fdset-id:1, fd:-1' not found");
    assert_eq!(text(1, Some(1 << 40)), "File descriptor named 'fdset-id:1, fd:1099511627776' not found");
    let number = i64::from(dup.as_raw_fd());
    assert_eq!(text(1, Some(number)), format!("File descriptor named 'fdset-id:1, fd:{number}' not found"));
    assert_eq!(sets.len(), 2, "nothing was closed");
}

#[test]
fn removal_closes_at_once() {
    let sets = FdSets::new();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let added = sets.add(writer, None, None).unwrap();
    assert_eq!(sets.remove(added.set_id, Some(added.fd.into())).unwrap(), 1);
    assert_eq!(rustix::io::read(&reader, &mut [0; 1]).unwrap(), 0);
    assert_eq!(sets.list().len(), 0);
}

#[test]
fn emptied_set_lives_on_for_its_dups() {
    let (image, sets) = (Image::new(), FdSets::new());
    sets.add(image.read_only(), None, None).unwrap();
    let dup = sets.open(0, Access::READ_ONLY).unwrap();
    assert_eq!(sets.remove(0, None).unwrap(), 1);
    assert_eq!(listing(&sets), [(0, vec![])]);
    assert_eq!(sets.add(image.read_only(), None, None).unwrap().set_id, 1, "its id stays taken");
    assert_eq!(sets.remove(0, None).unwrap(), 0, "removing all of it again succeeds");
    let error = sets.open(0, Access::READ_ONLY).unwrap_err();
    assert_eq!(error.to_string(), "Failed to find file descriptor with matching flags=0x0");
    assert_eq!(error.detail(), "asked for read-only; set 0 holds no descriptor, only 1 duplicates in use");
    drop(dup);
    assert_eq!(listing(&sets).iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1]);
    assert_eq!(sets.add(image.read_only(), None, None).unwrap().set_id, 0);
}

#[test]
fn last_dup_frees_the_set_from_any_thread() {
    fn is_shareable<T: Send + Sync + 'static>() {}
    is_shareable::<Dup>();
    let (image, sets) = (Image::new(), FdSets::new());
    sets.add(image.read_only(), None, None).unwrap();
    let dups: Vec<Dup> = (0..8).map(|_| sets.open(0, Access::READ_ONLY).unwrap()).collect();
    sets.remove(0, None).unwrap();
    std::thread::scope(|scope| {
        for dup in dups {
            scope.spawn(move || drop(dup));
        }
    });
    assert_eq!(sets.list().len(), 0);
}

#[test]
fn opens_and_removals_on_many_threads_leave_nothing_behind() {
    let (image, sets) = (Image::new(), FdSets::new());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..500 {
                    let added = sets.add(image.read_only(), None, None).unwrap();
                    let dup = sets.open(added.set_id, Access::READ_ONLY).unwrap();
                    assert_eq!(dup.opened_from(), added.fd, "no other thread's descriptor is in this set");
                    sets.remove(added.set_id, Some(added.fd.into())).unwrap();
                }
            });
        }
    });
    assert_eq!((sets.len(), sets.list().len()), (0, 0));
}

#[test]
fn dup_outlives_the_sets() {
    let (image, sets) = (Image::new(), FdSets::new());
    sets.add(image.read_only(), None, None).unwrap();
    let dup = sets.open(0, Access::READ_ONLY).unwrap();
    drop(sets);
    assert_eq!(rustix::io::pread(&dup, &mut [0; 16], 0).unwrap(), 16);
}

#[test]
fn dropping_the_sets_closes_their_descriptors() {
    let sets = FdSets::new();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    sets.add(writer, None, None).unwrap();
    drop(sets);
    assert_eq!(rustix::io::read(&reader, &mut [0; 1]).unwrap(), 0);
}

#[test]
fn newest_match_is_opened() {
    let (old, new, sets) = (Image::new(), Image::new(), FdSets::new());
    sets.add(old.read_only(), Some(0), None).unwrap();
    let newer = sets.add(new.read_only(), Some(0), None).unwrap();
    sets.add(new.read_write(), Some(0), None).unwrap();
    let dup = sets.open(0, Access::READ_ONLY).unwrap();
    assert_eq!(dup.opened_from(), newer.fd);
    let inode = |fd: std::os::fd::BorrowedFd<'_>| rustix::fs::fstat(fd).unwrap().st_ino;
    assert_eq!(inode(dup.as_fd()), inode(new.read_only().as_fd()));
}

#[test]
fn read_write_descriptor_does_not_serve_a_read_only_open_nor_the_reverse() {
    let (image, sets) = (Image::new(), FdSets::new());
    sets.add(image.read_write(), Some(0), None).unwrap();
    sets.add(image.read_only(), Some(1), None).unwrap();
    let text = |id, access| sets.open(id, access).unwrap_err().to_string();
    assert_eq!(text(0, Access::READ_ONLY), "Failed to find file descriptor with matching flags=0x0");
    assert_eq!(text(1, Access::READ_WRITE), "Failed to find file descriptor with matching flags=0x2");
    assert_eq!(text(1, Access::CREATE), "Failed to find file descriptor with matching flags=0x42");
    assert_eq!(sets.open(1, Access::READ_WRITE).unwrap_err().errno(), Errno::ACCESS.raw_os_error());
    sets.open(0, Access::CREATE).unwrap();
}

#[test]
fn detail_says_what_was_asked_and_what_the_set_holds() {
    let (image, sets) = (Image::new(), FdSets::new());
    let a = sets.add(image.read_only(), Some(3), None).unwrap().fd;
    let b = sets.add(image.open(OFlags::WRONLY | OFlags::APPEND), Some(3), None).unwrap().fd;
    let error = sets.open(3, Access::READ_WRITE.direct()).unwrap_err();
    let expected = format!("asked for read-write direct; set 3 holds fd {a} read-only, fd {b} write-only append");
    assert_eq!(error.detail(), expected);
    assert_eq!(sets.open(4, Access::READ_ONLY).unwrap_err().detail(), "asked for set 4; there are the sets 3");
}

#[test]
fn detail_of_a_big_set_stays_short() {
    let (image, sets) = (Image::new(), FdSets::new());
    for _ in 0..200 {
        sets.add(image.read_only(), Some(0), None).unwrap();
    }
    let detail = sets.open(0, Access::READ_WRITE).unwrap_err().detail();
    assert!(detail.ends_with(" and 192 more") && detail.len() < 300, "{detail}");
    let path = format!("/dev/fdset/{}", "\n".repeat(1 << 20));
    let detail = sets.open_path(&path, Access::READ_ONLY).unwrap_err().detail();
    assert!(detail.len() < 600 && !detail.contains('\n'), "{detail}");
}

#[test]
fn missing_set_is_named_by_its_number() {
    let sets = FdSets::new();
    let error = sets.open_path("/dev/fdset/ +07", Access::READ_ONLY).unwrap_err();
    assert_eq!(error.to_string(), "Failed to find fdset /dev/fdset/7");
    assert_eq!(error.errno(), Errno::NOENT.raw_os_error());
}

#[test]
fn a_set_that_stands_for_a_directory_is_opened_whole_or_not_at_all() {
    let (image, sets) = (Image::new(), FdSets::new());
    for name in ["b", "a/c"] {
        sets.add(image.read_only(), Some(3), Some(name.into())).unwrap();
    }
    let all = sets.open_all(3, Access::READ_ONLY, "disk").unwrap();
    let names: Vec<_> = all.iter().map(|(name, _)| name.as_deref()).collect();
    assert_eq!(names, [Some("b"), Some("a/c")]);
    assert_eq!(sets.set(3).unwrap().dups().map(|dup| dup.user() == Some("disk")).collect::<Vec<_>>(), [true, true]);
    drop(all);
    sets.add(image.open(OFlags::RDWR), Some(3), None).unwrap();
    let error = sets.open_all(3, Access::READ_ONLY, "disk").unwrap_err();
    assert_eq!(error.to_string(), "Failed to find file descriptor with matching flags=0x0");
    assert_eq!(sets.set(3).unwrap().dups().len(), 0);
    assert_eq!(
        sets.open_all(4, Access::READ_ONLY, "disk").unwrap_err().to_string(),
        "Failed to find fdset /dev/fdset/4"
    );
}

#[test]
fn dup_is_close_on_exec_and_shares_the_description() {
    let (image, sets) = (Image::new(), FdSets::new());
    let client = image.read_only();
    sets.add(client.try_clone().unwrap(), None, None).unwrap();
    let dup = sets.open(0, Access::READ_ONLY).unwrap();
    assert!(rustix::io::fcntl_getfd(&dup).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    rustix::fs::seek(&client, rustix::fs::SeekFrom::Start(77)).unwrap();
    assert_eq!(rustix::fs::tell(&dup).unwrap(), 77);
}

#[test]
fn open_leaves_the_status_flags_of_the_client_alone() {
    let (image, sets) = (Image::new(), FdSets::new());
    let client = image.open(OFlags::RDWR | OFlags::APPEND | OFlags::NONBLOCK | OFlags::NOATIME);
    let before = rustix::fs::fcntl_getfl(&client).unwrap();
    sets.add(client.try_clone().unwrap(), None, None).unwrap();
    let _dup = sets.open(0, Access::READ_WRITE).unwrap();
    let _create = sets.open(0, Access::CREATE).unwrap();
    assert_eq!(rustix::fs::fcntl_getfl(&client).unwrap(), before);
}

#[test]
fn direct_flag_counts_as_it_is_now_not_as_it_was() {
    let (image, sets) = (Image::new(), FdSets::new());
    let Some(client) = image.direct(OFlags::RDWR, "direct_flag_counts_as_it_is_now_not_as_it_was") else { return };
    sets.add(client.try_clone().unwrap(), None, None).unwrap();
    sets.open(0, Access::READ_WRITE.direct()).unwrap();
    rustix::fs::fcntl_setfl(&client, OFlags::empty()).unwrap();
    sets.open(0, Access::READ_WRITE).unwrap();
    assert!(sets.open(0, Access::READ_WRITE.direct()).is_err());
    assert!(sets.set(0).unwrap().fds().next().unwrap().rights().direct());
    sets.refresh();
    assert!(!sets.set(0).unwrap().fds().next().unwrap().rights().direct());
}

#[test]
fn listing_counts_live_dups_by_descriptor() {
    let (image, sets) = (Image::new(), FdSets::new());
    let read_only = sets.add(image.read_only(), Some(0), None).unwrap();
    let read_write = sets.add(image.read_write(), Some(0), None).unwrap();
    let a = sets.open(0, Access::READ_ONLY).unwrap();
    let b = sets.open(0, Access::READ_ONLY).unwrap();
    let c = sets.open(0, Access::READ_WRITE).unwrap();
    let set = sets.set(0).unwrap();
    assert_eq!(set.fds().map(fdset::FdInfo::dups).collect::<Vec<_>>(), [2, 1]);
    let ledger: Vec<(i32, i32)> = set.dups().map(|dup| (dup.number(), dup.opened_from())).collect();
    let expected = [(a.as_raw_fd(), read_only.fd), (b.as_raw_fd(), read_only.fd), (c.as_raw_fd(), read_write.fd)];
    assert_eq!(ledger, expected);
    drop(a);
    sets.remove(0, Some(read_write.fd.into())).unwrap();
    let set = sets.set(0).unwrap();
    assert_eq!((numbers(&set), set.dups().len()), (vec![read_only.fd], 2));
    assert_eq!(set.fds().next().unwrap().dups(), 1);
}

#[test]
fn failed_open_leaves_no_dup() {
    let (image, sets) = (Image::new(), FdSets::with(Settings::default()));
    sets.add(image.open(OFlags::RDWR | OFlags::SYNC), Some(0), None).unwrap();
    assert!(sets.open(0, Access::READ_WRITE).is_err());
    assert_eq!(sets.set(0).unwrap().dups().len(), 0);
    sets.remove(0, None).unwrap();
    assert_eq!(sets.list().len(), 0);
}

#[test]
fn other_paths_are_never_opened() {
    let sets = FdSets::new();
    let error = sets.open_path("/etc/passwd", Access::READ_ONLY).unwrap_err();
    assert!(matches!(error, Error::NotAnFdset { .. }));
    assert_eq!(error.errno(), Errno::PERM.raw_os_error());
}
