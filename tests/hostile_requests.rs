// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Requests that a policy must refuse, each for its reason, which is in the audit log; and races that nobody wins.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use harness::{Scratch, doorless, program};
use manager::chain::Policy as Wanted;
use manager::policy::{Asker, Audit, Door, Policy};
use rustix::fs::{CWD, FileType, Mode, RenameFlags, makedev, mknodat, renameat_with};
use serde_json::Value;

/// The client of the policy; the files that are his.
const MALLORY: u32 = 54_321;
const VICTIM: u32 = 54_322;
const STRANGER: u32 = 54_323;
const GUEST: u32 = 54_324;

/// Directories of the policy, files of several users in them, and the door.
struct World {
    scratch: Scratch,
    door: Door,
    read: usize,
}

impl World {
    /// `None` without the rights to give files to others.
    fn new(test: &str, limits: &str) -> Option<World> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: {test}: needs root, to give files to several users");
            return None;
        }
        let scratch = Scratch::new();
        for directory in ["disks", "disks-beside", "templates", "outside"] {
            fs::create_dir(scratch.path(directory)).unwrap();
        }
        let text = format!(
            "version = 1\n\
             [[rule]]\nname = 'disks'\nroot = '{0}/disks'\naccess = 'read-write'\nformats = ['raw', 'qcow2']\n\
             backing = ['templates']\ndepth = 3\n\
             [[rule]]\nname = 'templates'\nroot = '{0}/templates'\naccess = 'read-only'\nowners = ['root']\n\
             formats = ['raw']\n\
             [[client]]\nuser = '{MALLORY}'\nrules = ['disks', 'templates']\n{limits}\n\
             [[client]]\nuser = '{GUEST}'\nrules = ['templates']\n",
            scratch.name("").trim_end_matches('/')
        );
        let door = Door::new(Policy::parse(&text).unwrap(), Audit::append(&scratch.path("audit")).unwrap());
        Some(World { scratch, door, read: 0 })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path(name)
    }

    /// A file of a user.
    fn file(&self, name: &str, owner: u32) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, [7; 4096]).unwrap();
        chown(&path, Some(owner), Some(owner)).unwrap();
        path
    }

    /// A qcow2 image of Mallory's that says its backing file is called `backing`.
    fn overlay(&self, name: &str, backing: &str, format: &str) -> PathBuf {
        let path = self.path(name);
        let text = path.to_str().unwrap();
        let create = ["img", "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", format, text, "1M"];
        let (status, _, errors) = doorless(&create);
        assert!(status.success(), "{errors}");
        chown(&path, Some(MALLORY), Some(MALLORY)).unwrap();
        path
    }

    /// Lines of the audit log since the last call.
    fn log(&mut self) -> Vec<Value> {
        let text = fs::read_to_string(self.path("audit")).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let new = lines[self.read..].to_vec();
        self.read = lines.len();
        new
    }

    /// A request that must be refused by the check called `check`, and be in the log with it.
    fn refused(&mut self, check: &str, path: &Path, uid: u32, format: Option<&str>, read_only: bool) {
        let wanted = Wanted { format: format.map(str::to_owned), read_only, ..Wanted::default() };
        let asker = Asker { pid: 77, uid, gid: uid };
        let outcome = self.door.open(&program(), asker, path, &wanted);
        let error = outcome.map(|_| ()).expect_err(&format!("{} should be refused by {check}", path.display()));
        let log = self.log();
        let last = log.last().unwrap();
        assert_eq!((&last["decision"], &last["check"]), (&"refused".into(), &check.into()), "{last} {error}");
        assert_eq!((&last["uid"], &last["pid"]), (&uid.into(), &77.into()));
        assert!(!last["reason"].as_str().unwrap().is_empty() && last["path"].is_string() && last["time"].is_f64());
        assert!(log[..log.len() - 1].iter().all(|line| line["decision"] == "allowed"), "one reason for one request");
    }

    /// The usual: Mallory wants a raw disk to write.
    fn raw(&mut self, check: &str, path: &Path) {
        self.refused(check, path, MALLORY, Some("raw"), false);
    }

    fn qcow2(&mut self, check: &str, path: &Path) {
        self.refused(check, path, MALLORY, Some("qcow2"), false);
    }
}

#[test]
fn what_is_allowed_is_opened_and_written_down() {
    let Some(mut world) = World::new("what_is_allowed_is_opened_and_written_down", "") else { return };
    let base = world.file("templates/base", 0);
    let disk = world.overlay("disks/top", "../templates/base", "raw");
    let wanted = Wanted { format: Some("qcow2".into()), ..Wanted::default() };
    let asker = Asker { pid: 77, uid: MALLORY, gid: MALLORY };
    let (chain, grant) = world.door.open(&program(), asker, &disk, &wanted).unwrap();
    assert_eq!(chain.layers.len(), 2);
    let inodes: Vec<u64> = grant.files.iter().map(|file| file.1).collect();
    assert_eq!(inodes, [disk.metadata().unwrap().ino(), base.metadata().unwrap().ino()]);
    let log = world.log();
    let told: Vec<_> = log.iter().map(|line| (&line["rule"], &line["rights"], line["inode"].as_u64())).collect();
    let (disks, templates) = (Value::from("disks"), Value::from("templates"));
    let (read, write) = (Value::from("read-only"), Value::from("read-write"));
    let told_of_disk = [(&disks, &read, Some(inodes[0])), (&disks, &write, Some(inodes[0]))];
    assert_eq!(told, [&told_of_disk[..], &[(&templates, &read, Some(inodes[1]))]].concat());
    assert!(log.iter().all(|line| line["decision"] == "allowed"));
    assert_eq!(world.door.quotas().held(MALLORY), (1, 2));
    world.door.give_back(&grant);
    assert_eq!(world.door.quotas().held(MALLORY), (0, 0));
}

#[test]
fn a_name_that_leads_elsewhere_is_refused() {
    let Some(mut world) = World::new("a_name_that_leads_elsewhere_is_refused", "") else { return };
    let own = world.file("disks/own", MALLORY);
    let secret = world.file("outside/secret", MALLORY);
    world.file("disks-beside/own", MALLORY);
    symlink(&secret, world.path("disks/link-out")).unwrap();
    symlink(&own, world.path("disks/link-in")).unwrap();
    symlink("nowhere", world.path("disks/link-dangling")).unwrap();
    symlink(world.path("outside"), world.path("disks/directory-link")).unwrap();
    symlink("/proc/self/fd/0", world.path("disks/magic")).unwrap();
    symlink("loop", world.path("disks/loop")).unwrap();
    world.raw("name", Path::new("disks/own"));
    world.raw("name", &world.path("disks/../outside/secret"));
    world.raw("name", &world.path("disks/own/../own"));
    world.raw("root", &secret);
    world.raw("root", &world.path("disks-beside/own"));
    world.raw("root", Path::new("/etc/shadow"));
    world.raw("root", Path::new("/proc/self/exe"));
    world.raw("reach", &world.path("disks"));
    world.raw("reach", &world.path("disks/missing"));
    world.raw("reach", &world.path("disks/own/below"));
    for link in ["link-out", "link-in", "link-dangling", "directory-link/secret", "magic", "loop"] {
        world.raw("reach", &world.path("disks").join(link));
    }
    world.raw("reach", &world.path("disks").join("x".repeat(300)));
    world.raw("reach", &world.path("disks/new\nline \u{1b}[31m\","));
    world.raw("reach", &world.path("disks").join(OsStr::from_bytes(b"\xff\xfe")));
    // What was allowed all the time still is.
    let wanted = Wanted { format: Some("raw".into()), ..Wanted::default() };
    world.door.open(&program(), Asker { pid: 1, uid: MALLORY, gid: 0 }, &own, &wanted).unwrap();
}

#[test]
fn a_file_of_another_kind_or_of_somebody_else_is_refused() {
    let Some(mut world) = World::new("a_file_of_another_kind_or_of_somebody_else_is_refused", "") else { return };
    let node = |name: &str, kind, device| mknodat(CWD, world.path(name), kind, Mode::RWXU, device);
    node("disks/fifo", FileType::Fifo, 0).unwrap();
    let devices = node("disks/null", FileType::CharacterDevice, makedev(1, 3)).is_ok()
        && node("disks/loop0", FileType::BlockDevice, makedev(7, 0)).is_ok();
    let _socket = UnixListener::bind(world.path("disks/socket")).unwrap();
    fs::create_dir(world.path("disks/directory")).unwrap();
    let kinds =
        if devices { &["fifo", "socket", "directory", "null", "loop0"][..] } else { &["fifo", "socket", "directory"] };
    for kind in kinds {
        chown(world.path("disks").join(kind), Some(MALLORY), None).unwrap();
        world.raw("type", &world.path("disks").join(kind));
    }
    let victim = world.file("disks/victim", VICTIM);
    let of_root = world.file("disks/of-root", 0);
    fs::hard_link(&victim, world.path("disks/own-name-for-victim")).unwrap();
    let own = world.file("disks/own", MALLORY);
    fs::hard_link(&own, world.path("outside/other-name")).unwrap();
    world.raw("owner", &victim);
    world.raw("owner", &of_root);
    world.raw("owner", &world.path("disks/own-name-for-victim"));
    world.raw("hard-links", &own);
    let closed = world.file("disks/closed", MALLORY);
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o000)).unwrap();
    world.raw("mode", &closed);
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o477)).unwrap();
    world.raw("mode", &closed);
    let template = world.file("templates/base", 0);
    world.raw("rights", &template);
    world.refused("client", &template, STRANGER, Some("raw"), true);
    let disk = world.file("disks/disk", MALLORY);
    world.refused("root", &disk, GUEST, Some("raw"), false);
    world.refused("format", &disk, MALLORY, None, false);
}

#[test]
fn an_image_that_names_what_is_not_its_own_is_refused() {
    let Some(mut world) = World::new("an_image_that_names_what_is_not_its_own_is_refused", "") else { return };
    world.file("disks/own", MALLORY);
    world.file("disks/victim", VICTIM);
    world.file("outside/secret", MALLORY);
    symlink("own", world.path("disks/link")).unwrap();
    mknodat(CWD, world.path("disks/fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    let cases = [
        ("/etc/shadow", "root"),
        ("../outside/secret", "root"),
        ("x/../../outside/secret", "root"),
        ("victim", "owner"),
        ("link", "reach"),
        ("fifo", "type"),
        ("missing", "reach"),
        ("nbd:localhost:10809", "name"),
        ("json:{\"driver\":\"file\",\"filename\":\"/etc/shadow\"}", "name"),
        ("fd:0", "name"),
    ];
    for (index, (backing, check)) in cases.iter().enumerate() {
        let top = world.overlay(&format!("disks/top{index}"), backing, "raw");
        world.qcow2(check, &top);
    }
    // An external data file: a name of eleven letters in place of another.
    let (path, data) = (world.path("disks/data"), "data_file=elevenchars");
    let (status, _, errors) =
        doorless(&["img", "create", "-q", "-f", "qcow2", "-o", data, path.to_str().unwrap(), "1M"]);
    assert!(status.success(), "{errors}");
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(11).position(|window| window == b"elevenchars").unwrap();
    bytes[at..at + 11].copy_from_slice(b"/etc/passwd");
    fs::write(&path, bytes).unwrap();
    chown(&path, Some(MALLORY), None).unwrap();
    world.qcow2("root", &path);

    let itself = world.overlay("disks/itself", "itself", "qcow2");
    world.qcow2("image", &itself);
    for (name, backing) in [("d0", "d1"), ("d1", "d2"), ("d2", "d3")] {
        world.overlay(&format!("disks/{name}"), backing, "qcow2");
    }
    world.overlay("disks/d3", "own", "raw");
    world.qcow2("depth", &world.path("disks/d0"));
    let broken = world.file("disks/broken", MALLORY);
    world.qcow2("image", &broken);
    world.overlay("templates/overlay", "base", "raw");
    chown(world.path("templates/overlay"), Some(0), None).unwrap();
    let over = world.overlay("disks/over", "../templates/overlay", "qcow2");
    world.qcow2("format", &over);
}

#[test]
fn floods_are_refused_and_others_served() {
    let limits = "limits = { disks = 2, descriptors = 3, requests-per-minute = 6 }";
    let Some(mut world) = World::new("floods_are_refused_and_others_served", limits) else { return };
    world.file("templates/base", 0);
    let (own, top) = (world.file("disks/own", MALLORY), world.overlay("disks/top", "../templates/base", "raw"));
    let asker = Asker { pid: 77, uid: MALLORY, gid: MALLORY };
    let (raw, qcow2) = (Some("raw".to_owned()), Some("qcow2".to_owned()));
    let wanted = |format: &Option<String>| Wanted { format: format.clone(), ..Wanted::default() };
    let (_, first) = world.door.open(&program(), asker, &top, &wanted(&qcow2)).unwrap();
    // Two descriptors more would be four.
    world.qcow2("quota", &top);
    world.door.open(&program(), asker, &own, &wanted(&raw)).unwrap();
    // A third disk.
    world.raw("quota", &own);
    world.door.give_back(&first);
    world.door.open(&program(), asker, &own, &wanted(&raw)).unwrap();
    world.raw("quota", &own);
    for _ in 0..20 {
        world.raw("quota", &own);
    }
    let guest = Asker { pid: 78, uid: GUEST, gid: GUEST };
    let template = Wanted { read_only: true, ..wanted(&raw) };
    world.door.open(&program(), guest, &world.path("templates/base"), &template).unwrap();
}

/// Exchanges two names for as long as requests are made; what was opened is `own` or was refused.
fn race(world: &mut World, own: &Path, name: &str, other: &str, asked: &str) {
    let inode = own.metadata().unwrap().ino();
    let (one, two) = (world.path(name), world.path(other));
    let asked = world.path(asked);
    let over = AtomicBool::new(false);
    let (mut opened, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                renameat_with(CWD, &one, CWD, &two, RenameFlags::EXCHANGE).unwrap();
            }
        });
        let policy = Wanted { format: Some("raw".into()), read_only: true, ..Wanted::default() };
        let asker = Asker { pid: 77, uid: MALLORY, gid: MALLORY };
        for _ in 0..60 {
            match world.door.open(&program(), asker, &asked, &policy) {
                Ok((chain, grant)) => {
                    assert_eq!(chain.layers[0].image.file.metadata().unwrap().ino(), inode);
                    world.door.give_back(&grant);
                    opened += 1;
                }
                Err(_) => refused += 1,
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    let log = world.log();
    let allowed = |line: &&Value| line["decision"] == "allowed";
    assert!(log.iter().filter(allowed).all(|line| line["inode"] == inode), "only its own file was ever opened");
    assert_eq!(
        log.iter().filter(|line| line["decision"] == "refused").count(),
        refused,
        "every refusal is written down"
    );
    eprintln!("{asked:?}: {opened} opened, {refused} refused");
}

#[test]
fn nobody_wins_a_race_between_check_and_use() {
    let limits = "limits = { requests-per-minute = 100000 }";
    let Some(mut world) = World::new("nobody_wins_a_race_between_check_and_use", limits) else { return };
    let own = world.file("disks/own", MALLORY);
    let secret = world.file("outside/secret", MALLORY);
    symlink(&secret, world.path("disks/link")).unwrap();
    race(&mut world, &own.clone(), "disks/own", "disks/link", "disks/own");
    let own = [own, world.path("disks/link")].into_iter().find(|path| !path.is_symlink()).unwrap();
    fs::rename(&own, world.path("disks/mine")).unwrap();
    let mine = world.path("disks/mine");
    world.file("disks/victim", VICTIM);
    race(&mut world, &mine, "disks/mine", "disks/victim", "disks/mine");
    let inner = world.path("disks/inner");
    fs::create_dir(&inner).unwrap();
    let file = world.file("disks/inner/secret", MALLORY);
    symlink(world.path("outside"), world.path("disks/inner-link")).unwrap();
    race(&mut world, &file, "disks/inner", "disks/inner-link", "disks/inner/secret");
}

#[test]
fn another_policy_withdraws_what_it_would_not_give_and_nothing_else() {
    let test = "another_policy_withdraws_what_it_would_not_give_and_nothing_else";
    let Some(mut world) = World::new(test, "") else { return };
    let (one, two) = (world.file("disks/one", MALLORY), world.file("disks/two", MALLORY));
    let template = world.file("templates/base", 0);
    let asker = Asker { pid: 77, uid: MALLORY, gid: MALLORY };
    let wanted = |read_only| Wanted { format: Some("raw".into()), read_only, ..Wanted::default() };
    let mut grant = |path: &Path, read_only| world.door.open(&program(), asker, path, &wanted(read_only)).unwrap().1;
    let grants = [grant(&one, false), grant(&two, true), grant(&template, true)];
    let text = format!(
        "version = 1\n[[rule]]\nname = 'r'\nroot = '{}/disks'\naccess = 'read-only'\nformats = ['raw']\n\
         [[client]]\nuser = '*'\nrules = ['r']\n",
        world.scratch.name("").trim_end_matches('/')
    );
    let withdrawn = world.door.replace(&program(), Policy::parse(&text).unwrap(), &grants.each_ref()).unwrap();
    assert_eq!(withdrawn, [0, 2], "one may be written no more, the template is beneath no root");
}

#[test]
fn the_example_is_a_policy_and_check_says_what_one_allows() {
    let scratch = Scratch::new();
    let example = include_str!("../docs/policy.example.toml");
    let (disks, templates) = (scratch.name("disks"), scratch.name("templates"));
    fs::create_dir(&disks).unwrap();
    fs::create_dir(&templates).unwrap();
    let text = example.replace("/var/lib/doorless/disks", &disks).replace("/var/lib/doorless/templates", &templates);
    let policy = scratch.name("policy.toml");
    fs::write(&policy, text).unwrap();
    fs::write(scratch.path("disks/a"), [0; 512]).unwrap();
    fs::write(scratch.path("b"), [0; 512]).unwrap();
    fs::set_permissions(&policy, fs::Permissions::from_mode(0o644)).unwrap();
    let check = |rest: &[&str]| doorless(&[&["policy", "check", "--policy", &policy], rest].concat());
    let (status, said, errors) = check(&[]);
    assert!(status.success() && said.contains("is sound"), "{errors}");
    let (a, b) = (scratch.name("disks/a"), scratch.name("b"));
    let (status, said, errors) = check(&["--format", "raw", &a]);
    assert!(status.success() && said == format!("allowed: {a}\n"), "{said}{errors}");
    let (status, said, _) = check(&["--format", "raw", &a, &b]);
    assert_eq!(status.code(), Some(1));
    assert!(said.contains("refused: ") && said.contains("(policy: root)"), "{said}");
    fs::set_permissions(&policy, fs::Permissions::from_mode(0o666)).unwrap();
    let (status, _, errors) = check(&[]);
    assert!(!status.success() && errors.contains("could be changed by others"), "{errors}");
}
