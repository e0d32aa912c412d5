// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The load: plain NBD over a unix socket, a fixed number of requests in flight, everything read is checked.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::servers::{Format, Running};

/// One kind of load.
pub struct Workload {
    pub name: &'static str,
    pub format: Format,
    block: usize,
    depth: usize,
    connections: u64,
    /// Writes, per cent.
    pub writes: u64,
    sequential: bool,
    pub cache: Cache,
}

/// Where the host finds the disk's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// All of them in its page cache.
    Warm,
    /// None of them there when the measurement begins.
    Cold,
    /// On the device, past the page cache (`O_DIRECT`).
    Direct,
}

impl Workload {
    /// The same past, or without, the page cache.
    pub const fn cache(self, cache: Cache) -> Workload {
        Workload { cache, ..self }
    }

    pub const fn new(
        name: &'static str,
        format: Format,
        block: usize,
        depth: usize,
        connections: u64,
        writes: u64,
    ) -> Workload {
        Workload { name, format, block, depth, connections, writes, sequential: false, cache: Cache::Warm }
    }

    pub const fn sequential(name: &'static str, format: Format, block: usize, depth: usize, writes: u64) -> Workload {
        Workload { name, format, block, depth, connections: 1, writes, sequential: true, cache: Cache::Warm }
    }
}

/// What was measured.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Requests a second.
    pub iops: f64,
    /// MiB a second.
    pub mib: f64,
    /// The server's CPU time per request, microseconds.
    pub cpu: f64,
    /// Latency in microseconds that half, and 99 of 100, of the requests stay under.
    pub p50: f64,
    pub p99: f64,
    /// From the server's start to its first answer, milliseconds.
    pub start: f64,
    /// Resident memory afterwards, MiB.
    pub memory: f64,
}

/// Bytes of what the pattern is made of.
const SECTOR: usize = 512;
/// A payload from this many bytes on is not copied behind its header first: the load must not be slower than the servers.
const LARGE: usize = 64 << 10;
/// What a sector holds behind its number.
const FILLER: [u8; SECTOR] = {
    let (mut filler, mut state, mut at) = ([0; SECTOR], 0x9e37_79b9_u32, 0);
    while at < SECTOR {
        state = state.wrapping_mul(0x0019_660d).wrapping_add(0x3c6e_f35f);
        filler[at] = state.to_be_bytes()[0];
        at += 1;
    }
    filler
};

/// What a disk holds at an offset, a multiple of 512: every sector differs from every other one, and every writer writes the same.
fn pattern(buf: &mut [u8], offset: u64) {
    for (index, sector) in buf.chunks_mut(SECTOR).enumerate() {
        sector.copy_from_slice(&FILLER[..sector.len()]);
        let number = offset / SECTOR as u64 + index as u64;
        sector[..8].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    }
}

/// Writes a disk full of the pattern.
pub fn make_disk(path: &Path, size: u64) {
    let mut file = File::create(path).unwrap();
    let mut piece = vec![0; 1 << 20];
    for offset in (0..size).step_by(piece.len()) {
        pattern(&mut piece, offset);
        file.write_all(&piece).unwrap();
    }
}

/// Writes to disk what is not there yet, and takes a file out of the page cache.
fn evict(path: &Path) -> File {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    file
}

/// Brings all of a file into the page cache: in large folios for a sequential load, page by page for a random one. In a large
/// folio it takes ext4 several times as long to write 4 KiB as it takes any server to have it written.
pub fn warm(path: &Path, workload: &Workload) {
    let mut file = evict(path);
    if !workload.sequential {
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).unwrap();
    }
    std::io::copy(&mut file, &mut std::io::sink()).unwrap();
}

/// Runs a workload for a while.
pub fn measure(server: &Running, workload: &Workload, image: &Path, length: Duration) -> Measured {
    let mut first = Connection::open(&server.socket);
    if workload.format == Format::EmptyQcow2 {
        first.write(0, workload.block);
    }
    first.read_and_check(0, workload.block);
    let start = server.started.elapsed();
    // Warms the server up: its metadata, and the processor's caches.
    run(server, workload, length / 8);
    if workload.cache == Cache::Cold {
        evict(image);
    }
    let cpu_before = server.cpu();
    let began = Instant::now();
    let mut latencies = run(server, workload, length);
    let wall = began.elapsed();
    let cpu = server.cpu() - cpu_before;
    let count = latencies.len() as f64;
    latencies.sort_unstable();
    let percentile = |of: usize| latencies[(latencies.len() - 1) * of / 100] as f64 / 1000.0;
    Measured {
        iops: count / wall.as_secs_f64(),
        mib: count * workload.block as f64 / wall.as_secs_f64() / f64::from(1 << 20),
        cpu: cpu.as_secs_f64() * 1e6 / count,
        p50: percentile(50),
        p99: percentile(99),
        start: start.as_secs_f64() * 1e3,
        memory: server.memory() as f64 / f64::from(1 << 20),
    }
}

/// Latencies of all requests, nanoseconds.
fn run(server: &Running, workload: &Workload, length: Duration) -> Vec<u64> {
    std::thread::scope(|scope| {
        let connections: Vec<_> = (0..workload.connections)
            .map(|seed| scope.spawn(move || Connection::open(&server.socket).load(workload, length, seed)))
            .collect();
        connections.into_iter().flat_map(|connection| connection.join().unwrap()).collect()
    })
}

struct Connection {
    socket: UnixStream,
    size: u64,
}

/// A request in flight.
#[derive(Clone)]
struct Flight {
    offset: u64,
    write: bool,
    sent: Instant,
}

impl Connection {
    /// Negotiates the default export with simple replies; asks again while the server listens but has no export yet, as
    /// qemu-storage-daemon does between two of its options.
    fn open(path: &Path) -> Connection {
        let asked = Instant::now();
        loop {
            match Connection::try_open(path) {
                Ok(connection) => return connection,
                Err(error) => assert!(asked.elapsed() < Duration::from_secs(5), "no export: {error}"),
            }
        }
    }

    fn try_open(path: &Path) -> std::io::Result<Connection> {
        let mut socket = UnixStream::connect(path)?;
        let mut greeting = [0; 18];
        socket.read_exact(&mut greeting)?;
        // Fixed newstyle without zeroes, then NBD_OPT_EXPORT_NAME of the empty name.
        socket.write_all(&[&3u32.to_be_bytes()[..], b"IHAVEOPT", &1u32.to_be_bytes(), &0u32.to_be_bytes()].concat())?;
        let mut export = [0; 10];
        socket.read_exact(&mut export)?;
        Ok(Connection { socket, size: u64::from_be_bytes(export[..8].try_into().unwrap()) })
    }

    fn write(&mut self, offset: u64, len: usize) {
        let mut request = Vec::new();
        header(&mut request, true, 0, offset, len);
        let mut payload = vec![0; len];
        pattern(&mut payload, offset);
        request.extend(payload);
        self.socket.write_all(&request).unwrap();
        self.socket.read_exact(&mut [0; 16]).unwrap();
    }

    fn read_and_check(&mut self, offset: u64, len: usize) {
        let mut request = Vec::new();
        header(&mut request, false, 0, offset, len);
        self.socket.write_all(&request).unwrap();
        let mut reply = vec![0; 16 + len];
        self.socket.read_exact(&mut reply).unwrap();
        check(&reply[16..], offset);
    }

    /// Sends what has gathered, and a payload behind it.
    fn send(&mut self, gathered: &mut Vec<u8>, payload: &[u8]) {
        let mut parts = &mut [IoSlice::new(gathered), IoSlice::new(payload)][..];
        IoSlice::advance_slices(&mut parts, 0);
        while !parts.is_empty() {
            let sent = self.socket.write_vectored(parts).unwrap();
            IoSlice::advance_slices(&mut parts, sent);
        }
        gathered.clear();
    }

    /// Keeps `depth` requests in flight until the time is over; latencies in nanoseconds.
    fn load(&mut self, workload: &Workload, length: Duration, seed: u64) -> Vec<u64> {
        let blocks = self.size / workload.block as u64;
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next_block = 0;
        let mut flights: Vec<Option<Flight>> = vec![None; workload.depth];
        let mut free: Vec<usize> = (0..workload.depth).collect();
        let mut latencies = Vec::with_capacity(1 << 20);
        let mut payload = vec![0; workload.block];
        let mut out = Vec::new();
        let mut inbox = Inbox { buf: vec![0; (1 << 20) + workload.block], start: 0, end: 0 };
        let deadline = Instant::now() + length;
        loop {
            let going = Instant::now() < deadline;
            while going && let Some(slot) = free.pop() {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let block = if workload.sequential { next_block } else { (random >> 16) % blocks };
                next_block = (next_block + 1) % blocks;
                let offset = block * workload.block as u64;
                let write = random % 100 < workload.writes;
                header(&mut out, write, slot as u64, offset, workload.block);
                if write {
                    pattern(&mut payload, offset);
                }
                let sent = Instant::now();
                if write && workload.block >= LARGE {
                    self.send(&mut out, &payload);
                } else if write {
                    out.extend_from_slice(&payload);
                }
                flights[slot] = Some(Flight { offset, write, sent });
            }
            self.send(&mut out, &[]);
            if free.len() == workload.depth {
                return latencies;
            }
            inbox.receive(&mut self.socket);
            while let Some(head) = inbox.bytes().first_chunk::<16>() {
                assert_eq!(head[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], "a reply without error");
                let slot = usize::try_from(u64::from_be_bytes(head[8..].try_into().unwrap())).unwrap();
                let flight = flights[slot].clone().expect("a request in flight");
                let len = if flight.write { 16 } else { 16 + workload.block };
                let Some(reply) = inbox.bytes().get(..len) else { break };
                // Every sixteenth is checked whole, the others by their first word: the check must not be the load.
                let data = &reply[16..];
                check(if latencies.len() % 16 == 0 { data } else { &data[..data.len().min(8)] }, flight.offset);
                inbox.start += len;
                latencies.push(u64::try_from(flight.sent.elapsed().as_nanos()).unwrap());
                flights[slot] = None;
                free.push(slot);
            }
        }
    }
}

fn header(out: &mut Vec<u8>, write: bool, cookie: u64, offset: u64, len: usize) {
    out.extend(0x2560_9513_u32.to_be_bytes());
    out.extend([0, 0, 0, u8::from(write)]);
    out.extend(cookie.to_be_bytes());
    out.extend(offset.to_be_bytes());
    out.extend(u32::try_from(len).unwrap().to_be_bytes());
}

fn check(data: &[u8], offset: u64) {
    let mut wanted = [0; 4096];
    for (index, piece) in data.chunks(wanted.len()).enumerate() {
        let wanted = &mut wanted[..piece.len()];
        pattern(wanted, offset + index as u64 * 4096);
        assert!(piece == wanted, "the server returned other bytes than the disk holds, at {offset}");
    }
}

struct Inbox {
    buf: Vec<u8>,
    start: usize,
    end: usize,
}

impl Inbox {
    fn bytes(&self) -> &[u8] {
        &self.buf[self.start..self.end]
    }

    fn receive(&mut self, socket: &mut UnixStream) {
        self.buf.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let came = socket.read(&mut self.buf[self.end..]).unwrap();
        assert!(came > 0, "the server hung up");
        self.end += came;
    }
}
