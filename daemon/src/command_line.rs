// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The daemon's command line, as qemu-storage-daemon has it: options take effect in order.
//!
//! Three steps: every option is read and checked; what options name on the host (inherited descriptors, sockets, image
//! files) is opened; the process is confined. Only then do options act, as the monitor's commands that they stand for.

use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;

use confine::{Layer, LayerReport, Plan, Requirement, Role};
use std::time::Duration;

use fdset::{FdPolicy, InUse, Lifetime, Quotas, Settings};
use qmp::{Definition, Member, PendingFds, Table, Type, Version};
use serde_json::{Map, Value};
use sys::signal::{self, Signals};

use crate::aio::Aio;
use crate::attest::Probe;
use crate::background::{self, Announcement, READY_OPTION};
use crate::control::{self, Ends, MonitorSetup, Setup};
use crate::opening::{Chardevs, Openings};
use crate::reserve;
use crate::state::{Daemon, FdsetEvents};
use crate::sweeper::Sweeper;

/// What `--help` prints.
pub const HELP: &str = "\
Usage: doorless daemon OPTION...

Serves disk images that arrive as descriptors. The process confines itself before it reads its first foreign byte.

  --chardev socket,id=ID,fd=N[,server=on|off][,wait=on|off]
  --chardev socket,id=ID,path=PATH[,server=on|off][,wait=on|off]
                         a socket for a monitor: an inherited descriptor (0 is standard input), or a path
  --monitor [chardev=]ID[,pretty=on|off][,fdset-lifetime=LIFETIME][,peer-uid=UID]
                         a QMP monitor on that socket; with peer-uid, for that user's processes alone
                         (an ordinary user's daemon knows no other user than its own)
  --add-fd fd=N,set=ID[,opaque=TEXT]
                         put an inherited descriptor into an fd set
  --blockdev OPTIONS     as blockdev-add; a file named here is opened before the process is confined
  --nbd-server addr.type=fd,addr.str=N[,max-connections=N][,handshake-max-seconds=N]
  --nbd-server addr.type=unix,addr.path=PATH[,...]
  --nbd-server addr.type=inet,addr.host=HOST,addr.port=PORT[,...][,tls-creds=ID[,tls-authz=ID]]
                         serve NBD on an inherited listening socket, or on one that is made before the process is confined
  --metrics-server addr.type=fd|unix|inet,addr....
                         answer scrapers of OpenMetrics (HTTP, GET /metrics) on a socket as of --nbd-server
  --export [type=]nbd,id=ID,node-name=NODE[,name=NAME][,writable=on|off]
  --export [type=]fuse,id=ID,node-name=NODE,mountpoint=PATH,fd=N[,writable=on|off][,growable=on|off]
  --export [type=]vhost-user-blk,id=ID,node-name=NODE,addr.type=fd,addr.str=N[,num-queues=N][,writable=on|off]
  --export [type=]vhost-user-blk,id=ID,node-name=NODE,addr.type=unix,addr.path=PATH[,...]
                         as block-export-add; a socket is inherited, or made before the process is confined; a mounted,
                         non-blocking /dev/fuse is inherited
  --aio auto|io_uring|threads
                         who waits for reads that the page cache cannot answer: threads, or io_urings that can do nothing but
                         read and are made before the process is confined; auto takes those if the kernel gives any
  --confine require|standard|best-effort|LAYER,LAYER...
                         which layers of confinement must be had: all, all but namespaces and pid-namespace (the default),
                         none, or these; the others are applied where they can be had
  --attest               try every way out once confined, and end if one is open; query-confinement tells what was tried
  --fd-policy strict|compat
                         whether add-fd refuses descriptors that cannot be disks, or takes all as QEMU does; default strict
  --fdset-lifetime explicit|monitor|lease:SECONDS
                         when what monitors' clients passed is closed: on remove-fd alone (the default), when the last client
                         has gone, or when none has come back for that long; what nodes use stays until they let go
  --fdset-quota [per-set=N][,per-peer=N][,total=N]
                         most descriptors in a set, from a user, in all sets (default: all but 64 of what the process may have)
  --fdset-events [changed=on|off][,stray=on|off][,wanted=SECONDS]
                         events about fd sets; with wanted, a command that lacks a descriptor waits for it that long (default 0)
  --object [qom-type=]iothread,id=ID
                         an object that exports may name
  --object secret,id=ID,file=PATH[,format=raw|base64]
                         a passphrase that nodes may name; the file is opened before the process is confined
  --object tls-creds-x509,id=ID,endpoint=server,dir=DIR[,verify-peer=on|off]
  --object authz-simple,id=ID,identity=NAME
  --object authz-list,id=ID[,policy=deny|allow],rules.0.match=NAME,rules.0.policy=allow[,rules.0.format=exact|glob]...
                         what --nbd-server may name; credentials are opened before the process is confined
  --pidfile PATH         write the process id there once everything else is done
  --daemonize            go on in the background once everything else is done
  --trace OPTIONS        accepted, and of no effect
  --ends-with-clients    end when the last NBD client has left
  --ends-with-monitors   end with the last client of a connected (not listening) monitor socket
  --help, --version

OPTIONS are key=value,key.sub=value,... or JSON. Options take effect in order.
";

/// Whom the kernel shows in a user namespace for a user who is not in it.
const OVERFLOW_UID: u32 = 65534;

/// A command line that cannot be understood or carried out; the text says why.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

impl From<qmp::Error> for UsageError {
    fn from(error: qmp::Error) -> UsageError {
        UsageError(error.desc)
    }
}

/// What is done once the process is confined.
enum Action {
    /// A command of the monitor's table, with the descriptors that were opened for it named `fd-N` for its monitor.
    Command { name: &'static str, arguments: Map<String, Value> },
}

/// What the command line asks for.
struct Plans {
    actions: Vec<Action>,
    openings: Openings,
    monitors: Vec<MonitorSetup>,
    fdsets: Settings,
    fdset_events: FdsetEvents,
    confinement: Plan,
    ends: Ends,
    announcement: Announcement,
    /// Whether it is to try and get out before it serves.
    attest: bool,
    /// Files of sockets.
    bound: Vec<PathBuf>,
    aio: Aio,
}

/// How the program presents itself.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    /// What fd sets take unless `--fd-policy` says otherwise.
    pub fd_policy: FdPolicy,
    /// What `--version` and `--help` call it.
    pub name: &'static str,
}

/// Runs the daemon: returns when it has ended properly.
///
/// # Errors
/// The command line is wrong, something it names cannot be opened, a layer of confinement is missing, or serving failed.
pub fn run(style: Style, arguments: impl IntoIterator<Item = OsString>) -> Result<(), UsageError> {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    if arguments.iter().any(|argument| argument == "--daemonize") {
        return background::start(style, arguments.into_iter().filter(|argument| argument != "--daemonize"));
    }
    signal::ignore_pipe();
    let signals = Signals::block(&[signal::INT, signal::TERM, signal::HUP]).map_err(failed("block signals"))?;
    let table = crate::commands::table();
    let Some(plans) = read(style, arguments, &table)? else { return Ok(()) };
    let Plans {
        actions,
        openings,
        monitors,
        mut fdsets,
        fdset_events,
        confinement,
        ends,
        announcement,
        attest,
        mut bound,
        aio,
    } = plans;
    sys::fd::close_inherited().map_err(failed("close what was inherited"))?;
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
    fdsets.quotas.total = fdsets.quotas.total.or_else(|| Some(reserve::sets_share(limit)));
    let inflight = reserve::inflight(limit);
    bound.extend_from_slice(openings.bound());
    bound.extend(announcement.file().map(Into::into));
    let sweeper = match bound.is_empty() {
        true => None,
        false => Some(Sweeper::start(&bound).map_err(failed("start what cleans up in the end"))?),
    };
    let rings = aio.rings().map_err(|e| {
        UsageError(format!(
            "--aio=io_uring: the kernel gives no restricted io_uring ({e}); say --aio=auto or --aio=threads"
        ))
    })?;
    let confinement = if rings.exist() { confinement.with_rings() } else { confinement };
    let probe = if attest { Some(Probe::prepare().map_err(failed("open what is to be tried"))?) } else { None };
    let confined = confine::confine(&confinement).map_err(|e| UsageError(e.to_string()))?;
    // A daemon that was started by hand always lacks this one, and tells so when it is asked.
    for LayerReport { layer, detail, .. } in confined.report().missing().filter(|it| it.layer != Layer::PidNamespace) {
        tracing::warn!("confined without the layer '{layer}': {detail}");
    }
    let attested = probe.map(|probe| probe.attest(confined.report(), &confinement, &rings)).transpose()?;
    let setup = Setup { monitors, fdsets, fdset_events, signals, ends, inflight, rings };
    let startup = |table: &Table<Daemon>, daemon: &mut Daemon| {
        if let Some(sweeper) = &sweeper {
            daemon.ledger.enter(sweeper.as_fd().as_raw_fd(), "what cleans up in the end");
        }
        daemon.attested = attested;
        act(table, daemon, openings, actions)?;
        announcement.make(daemon).map_err(|e| qmp::Error::generic(e.0))
    };
    control::serve(confined, setup, startup).map_err(|e| UsageError(e.to_string()))
}

/// Carries out what the options ask for, as the commands that they stand for.
fn act(table: &Table<Daemon>, daemon: &mut Daemon, openings: Openings, actions: Vec<Action>) -> Result<(), qmp::Error> {
    openings.hand_over(daemon)?;
    for Action::Command { name, arguments } in actions {
        let Some(command) = table.command(name) else {
            return Err(qmp::Error::command_not_found(format!("The command {name} has not been found")));
        };
        table.run(daemon, &mut PendingFds::default(), command, arguments)?;
    }
    Ok(())
}

/// Reads every option and opens what it names. `None` if the answer was printed.
fn read(
    style: Style,
    arguments: impl IntoIterator<Item = OsString>,
    table: &Table<Daemon>,
) -> Result<Option<Plans>, UsageError> {
    let words = words();
    let mut chardevs = Chardevs::default();
    let mut plans = Plans {
        actions: Vec::new(),
        openings: Openings::default(),
        monitors: Vec::new(),
        // With a life time, running nodes can still be reopened from their sets when the client has gone.
        fdsets: Settings { policy: style.fd_policy, in_use: InUse::Keep, ..Settings::default() },
        fdset_events: FdsetEvents::default(),
        confinement: Plan::new(Role::Daemon).requiring(Requirement::default()),
        ends: Ends::default(),
        announcement: Announcement::default(),
        attest: false,
        bound: Vec::new(),
        aio: Aio::default(),
    };
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let argument = text(argument)?;
        let (option, inline) = match argument.split_once('=') {
            Some((option, value)) if option.starts_with("--") => (option, Some(value.to_owned())),
            _ => (argument.as_str(), None),
        };
        let Some(name) = option.strip_prefix("--").or_else(|| option.strip_prefix('-')) else {
            return Err(UsageError(format!("unexpected argument '{option}'; see doorless daemon --help")));
        };
        match name {
            "help" | "h" => return print(HELP),
            "version" | "V" => return print(&format!("{} {}\n", style.name, env!("CARGO_PKG_VERSION"))),
            "ends-with-monitors" => {
                plans.ends.with_monitors = true;
                continue;
            }
            "attest" => {
                plans.attest = true;
                continue;
            }
            "ends-with-clients" => {
                plans.ends.with_clients = true;
                continue;
            }
            _ => {}
        }
        let value = match inline {
            Some(value) => value,
            None if KNOWN.contains(&name) => match arguments.next() {
                Some(value) => text(value)?,
                None => return Err(UsageError(format!("option '{option}' requires an argument"))),
            },
            None => return Err(unknown(option)),
        };
        let placed = |e: qmp::Error| UsageError(format!("{option} {value}: {}", e.desc));
        match name {
            "chardev" => {
                let options = words.option(Type::Named("ChardevOptions"), &value, Some("backend")).map_err(placed)?;
                chardevs.add(&options).map_err(|e| UsageError(format!("{option} {value}: {e}")))?;
            }
            "monitor" => {
                let options = words.option(Type::Named("MonitorOptions"), &value, Some("chardev")).map_err(placed)?;
                let id = options["chardev"].as_str().unwrap_or_default();
                let source = chardevs
                    .take(id)
                    .ok_or_else(|| placed(qmp::Error::generic(format!("Cannot find chardev '{id}'"))))?;
                let lifetime = options["fdset-lifetime"].as_str().map(lifetime).transpose()?;
                let pretty = options["pretty"] == true;
                let peer_uid = options["peer-uid"].as_u64().and_then(|uid| u32::try_from(uid).ok());
                if peer_uid == Some(OVERFLOW_UID) {
                    let text = format!(
                        "'peer-uid' = {OVERFLOW_UID} may be any user that has no name in the daemon's namespace"
                    );
                    return Err(placed(qmp::Error::generic(text)));
                }
                plans.monitors.push(MonitorSetup { source, pretty, lifetime, peer_uid });
            }
            "add-fd" => {
                let options = words.option(Type::Named("AddFdOptions"), &value, None);
                let options = options.map_err(|e| placed(in_old_words(e)))?;
                plans.openings.add_fd(&options).map_err(|e| UsageError(format!("{option} {value}: {e}")))?;
            }
            "blockdev" => {
                let mut options =
                    table.option(Type::Named("BlockdevOptions"), &value, Some("driver")).map_err(placed)?;
                plans
                    .openings
                    .open_files(&mut options, false, false)
                    .map_err(|e| UsageError(format!("{option} {value}: {e}")))?;
                plans.command("blockdev-add", options);
            }
            "nbd-server" => {
                let options = words.option(Type::Named("NbdServerOptions"), &value, None).map_err(placed)?;
                let options = plans
                    .openings
                    .server(options, "command-line-nbd-server")
                    .map_err(|e| UsageError(format!("{option} {value}: {e}")))?;
                plans.command("nbd-server-start", options);
            }
            "metrics-server" => {
                let options = words.option(Type::Named("MetricsServerOptions"), &value, None).map_err(placed)?;
                let options = plans.openings.server(options, "command-line-metrics-server");
                let options = options.map_err(|e| UsageError(format!("{option} {value}: {e}")))?;
                plans.command("metrics-server-start", options);
            }
            "export" => {
                let mut options =
                    table.option(Type::Named("BlockExportOptions"), &value, Some("type")).map_err(placed)?;
                plans.openings.export(&mut options).map_err(|e| UsageError(format!("{option} {value}: {e}")))?;
                plans.command("block-export-add", options);
            }
            "object" => {
                let mut options =
                    table.option(Type::Named("ObjectOptions"), &value, Some("qom-type")).map_err(placed)?;
                plans
                    .openings
                    .open_credentials(&mut options)
                    .and_then(|()| plans.openings.open_secret(&mut options))
                    .map_err(|e| UsageError(format!("{option} {value}: {e}")))?;
                plans.command("object-add", options);
            }
            "fdset-lifetime" => plans.fdsets.lifetime = lifetime(&value)?,
            "fdset-quota" => {
                let options = words.option(Type::Named("FdsetQuotaOptions"), &value, None).map_err(placed)?;
                let most = |key: &str| options[key].as_u64().and_then(|most| usize::try_from(most).ok());
                plans.fdsets.quotas =
                    Quotas { per_set: most("per-set"), per_peer: most("per-peer"), total: most("total") };
            }
            "fdset-events" => {
                let options = words.option(Type::Named("FdsetEventsOptions"), &value, None).map_err(placed)?;
                let events = &mut plans.fdset_events;
                events.changed = options["changed"].as_bool().unwrap_or(events.changed);
                events.stray = options["stray"].as_bool().unwrap_or(events.stray);
                let seconds = options["wanted"].as_u64().filter(|&seconds| seconds > 0);
                events.wanted = seconds.map(Duration::from_secs);
            }
            "aio" => {
                let aio = Aio::named(&value);
                let wrong = || UsageError(format!("--aio takes 'auto', 'io_uring' or 'threads', not '{value}'"));
                plans.aio = aio.ok_or_else(wrong)?;
            }
            "pidfile" => plans.announcement.pidfile(value)?,
            "trace" => {}
            READY_OPTION => plans.announcement.ready(&value)?,
            "confine" => {
                let requirement = value.parse().map_err(|e| UsageError(format!("--confine: {e}")))?;
                plans.confinement = Plan::new(Role::Daemon).requiring(requirement);
            }
            "fd-policy" => match value.as_str() {
                "strict" => plans.fdsets.policy = FdPolicy::Strict,
                "compat" => plans.fdsets.policy = FdPolicy::Compat,
                _ => return Err(UsageError(format!("--fd-policy takes 'strict' or 'compat', not '{value}'"))),
            },
            _ => return Err(unknown(option)),
        }
    }
    if let Some(id) = chardevs.unused() {
        return Err(UsageError(format!("chardev '{id}' has no monitor; add --monitor chardev={id}")));
    }
    plans.bound = chardevs.bound();
    Ok(Some(plans))
}

impl Plans {
    fn command(&mut self, name: &'static str, arguments: Value) {
        if let Value::Object(arguments) = arguments {
            self.actions.push(Action::Command { name, arguments });
        }
    }
}

/// Options that take a value.
const KNOWN: [&str; 17] = [
    "aio",
    "chardev",
    "monitor",
    "add-fd",
    "blockdev",
    "nbd-server",
    "metrics-server",
    "export",
    "object",
    "confine",
    "fd-policy",
    "fdset-lifetime",
    "fdset-quota",
    "fdset-events",
    "pidfile",
    "trace",
    READY_OPTION,
];

fn unknown(option: &str) -> UsageError {
    UsageError(format!("unrecognized option '{option}'; see doorless daemon --help"))
}

/// `explicit`, `monitor` or `lease:SECONDS`.
fn lifetime(text: &str) -> Result<Lifetime, UsageError> {
    let seconds = |text: &str| text.parse().ok().filter(|&seconds: &u32| seconds > 0);
    match (text, text.strip_prefix("lease:").and_then(seconds)) {
        ("explicit", _) => Ok(Lifetime::Explicit),
        ("monitor", _) => Ok(Lifetime::Monitor),
        (_, Some(seconds)) => Ok(Lifetime::Lease(Duration::from_secs(seconds.into()))),
        _ => Err(UsageError(format!(
            "a life time is 'explicit', 'monitor' or 'lease:SECONDS' with 1 to 4294967295 seconds, not '{text}'"
        ))),
    }
}

/// The types of options that are no commands.
fn words() -> Table<()> {
    let types = vec![
        Definition::enumeration("ChardevBackend", ["socket"], "Kinds of character devices."),
        Definition::structure(
            "ChardevOptions",
            [
                Member::required("backend", Type::Named("ChardevBackend"), "The kind."),
                Member::required("id", Type::Str, "Its name."),
                Member::optional("path", Type::Str, "Where the socket is."),
                Member::optional("fd", Type::Str, "The inherited descriptor of the socket."),
                Member::optional("server", Type::Bool, "Whether the socket listens; default false."),
                Member::optional("wait", Type::Bool, "Whether to wait for a client before going on; default true."),
            ],
            "A socket.",
        ),
        Definition::enumeration("MonitorMode", ["control"], "Kinds of monitors."),
        Definition::structure(
            "MonitorOptions",
            [
                Member::required("chardev", Type::Str, "The socket."),
                Member::optional("id", Type::Str, "Accepted, and of no use here."),
                Member::optional("mode", Type::Named("MonitorMode"), "Accepted: every monitor speaks QMP."),
                Member::optional("pretty", Type::Bool, "Whether output is indented; default false."),
                Member::optional("fdset-lifetime", Type::Str, "When what its clients passed is closed."),
                Member::optional("peer-uid", Type::Uint32, "The user whose processes alone are served."),
            ],
            "A monitor.",
        ),
        Definition::structure(
            "AddFdOptions",
            [
                Member::optional("fd", Type::Str, "The inherited descriptor's number."),
                Member::optional("set", Type::Str, "The set's number."),
                Member::optional("opaque", Type::Str, "Free text."),
            ],
            "A descriptor for a set.",
        ),
        Definition::structure(
            "FdsetQuotaOptions",
            [
                Member::optional("per-set", Type::Uint32, "Most descriptors in a set."),
                Member::optional("per-peer", Type::Uint32, "Most descriptors from a user."),
                Member::optional("total", Type::Uint32, "Most descriptors in all sets."),
            ],
            "How many descriptors may be passed.",
        ),
        Definition::structure(
            "FdsetEventsOptions",
            [
                Member::optional("changed", Type::Bool, "`FDSET_CHANGED`; default true."),
                Member::optional("stray", Type::Bool, "`FDSET_STRAY_FD`; default true."),
                Member::optional(
                    "wanted",
                    Type::Uint32,
                    "`FDSET_WANTED`: how long a command waits, seconds; default 0.",
                ),
            ],
            "Events about fd sets.",
        ),
        Definition::structure(
            "NbdServerOptions",
            [
                Member::required("addr", Type::Named("ListenAddress"), "The socket."),
                Member::optional("handshake-max-seconds", Type::Uint32, "How long a client may negotiate, seconds."),
                Member::optional("max-connections", Type::Uint32, "Most clients at once."),
                Member::optional("tls-creds", Type::Str, "The TLS that clients must begin."),
                Member::optional("tls-authz", Type::Str, "Which clients may come in."),
            ],
            "An NBD server.",
        ),
        Definition::structure(
            "MetricsServerOptions",
            [Member::required("addr", Type::Named("ListenAddress"), "The socket.")],
            "A server for scrapers.",
        ),
        Definition::enumeration("ListenAddressType", ["fd", "unix", "inet"], "Kinds of addresses."),
        Definition::union(
            "ListenAddress",
            [Member::required("type", Type::Named("ListenAddressType"), "The kind.")],
            "type",
            [("fd", Type::Named("ListenFd")), ("unix", Type::Named("ListenUnix")), ("inet", Type::Named("ListenInet"))],
            "Where to listen.",
        ),
        Definition::structure(
            "ListenFd",
            [Member::required("str", Type::Str, "The inherited descriptor.")],
            "Inherited.",
        ),
        Definition::structure(
            "ListenInet",
            [
                Member::required("host", Type::Str, "Host name or address."),
                Member::required("port", Type::Str, "Port."),
            ],
            "A TCP address.",
        ),
        Definition::structure("ListenUnix", [Member::required("path", Type::Str, "Its path.")], "A unix socket."),
    ];
    let version = Version { qemu: (0, 0, 0), package: String::new() };
    Table::new(version, types, Vec::new(), Vec::new()).expect("the table is consistent: every run builds it")
}

/// What QEMU says of an option that is older than its schema.
fn in_old_words(error: qmp::Error) -> qmp::Error {
    match error.desc.strip_suffix(" is unexpected").and_then(|desc| desc.strip_prefix("Parameter ")) {
        Some(name) => qmp::Error::generic(format!("Invalid parameter {name}")),
        None => error,
    }
}

fn print(text: &str) -> Result<Option<Plans>, UsageError> {
    use std::io::Write;
    std::io::stdout().write_all(text.as_bytes()).map_err(failed("write to standard output"))?;
    Ok(None)
}

fn text(argument: OsString) -> Result<String, UsageError> {
    argument.into_string().map_err(|raw| UsageError(format!("argument '{}' is not UTF-8", raw.to_string_lossy())))
}

fn failed(doing: &'static str) -> impl FnOnce(std::io::Error) -> UsageError {
    move |e| UsageError(format!("could not {doing}: {e}"))
}
