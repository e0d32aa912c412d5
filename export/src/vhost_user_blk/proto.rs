// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Numbers, headers and payloads of vhost-user (QEMU docs/interop/vhost-user.rst). Numbers are in the host's byte order.

/// Bytes of a message's header: request, flags, size of the payload.
pub const HEADER_LEN: usize = 12;
/// Most bytes of a payload: the largest that is defined is a table of 32 memory regions.
pub const MAX_PAYLOAD: usize = 4096;
/// Most regions of guest memory.
pub const MAX_REGIONS: usize = 32;
/// Most bytes of configuration space.
pub const MAX_CONFIG: usize = 256;

/// "Header", bits of `flags`.
mod flag {
    pub const VERSION_MASK: u32 = 0x3;
    pub const VERSION: u32 = 0x1;
    pub const REPLY: u32 = 0x4;
    pub const NEED_REPLY: u32 = 0x8;
}

/// "Protocol features", bits.
pub mod feature {
    /// Several queues.
    pub const MQ: u64 = 1 << 0;
    /// An answer to every message that asks for one.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// A channel on which the back end asks.
    pub const BACKEND_REQ: u64 = 1 << 5;
    /// Configuration space over this protocol.
    pub const CONFIG: u64 = 1 << 9;
    /// Memory that remembers what is under way.
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// `RESET_DEVICE`.
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// Regions of memory come and go one by one.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
}

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, on the back end's channel.
pub const CONFIG_CHANGE: u32 = 2;

/// "Front-end message types": those that a block device may be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "they are the specification's names")]
pub enum Request {
    GetFeatures,
    SetFeatures,
    SetOwner,
    ResetOwner,
    SetMemTable,
    SetVringNum,
    SetVringAddr,
    SetVringBase,
    GetVringBase,
    SetVringKick,
    SetVringCall,
    SetVringErr,
    GetProtocolFeatures,
    SetProtocolFeatures,
    GetQueueNum,
    SetVringEnable,
    SetBackendReqFd,
    GetConfig,
    SetConfig,
    GetInflightFd,
    SetInflightFd,
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg,
    RemMemReg,
}

/// Each request, its number, and the most descriptors that come with it.
const REQUESTS: &[(Request, u32, usize)] = &[
    (Request::GetFeatures, 1, 0),
    (Request::SetFeatures, 2, 0),
    (Request::SetOwner, 3, 0),
    (Request::ResetOwner, 4, 0),
    (Request::SetMemTable, 5, MAX_REGIONS),
    (Request::SetVringNum, 8, 0),
    (Request::SetVringAddr, 9, 0),
    (Request::SetVringBase, 10, 0),
    (Request::GetVringBase, 11, 0),
    (Request::SetVringKick, 12, 1),
    (Request::SetVringCall, 13, 1),
    (Request::SetVringErr, 14, 1),
    (Request::GetProtocolFeatures, 15, 0),
    (Request::SetProtocolFeatures, 16, 0),
    (Request::GetQueueNum, 17, 0),
    (Request::SetVringEnable, 18, 0),
    (Request::SetBackendReqFd, 21, 1),
    (Request::GetConfig, 24, 0),
    (Request::SetConfig, 25, 0),
    (Request::GetInflightFd, 31, 0),
    (Request::SetInflightFd, 32, 1),
    (Request::ResetDevice, 34, 0),
    (Request::GetMaxMemSlots, 36, 0),
    (Request::AddMemReg, 37, 1),
    // "For compatibility with existing incorrect implementations, the back-end MAY accept messages with one".
    (Request::RemMemReg, 38, 1),
];

impl Request {
    /// The number on the wire.
    pub fn number(self) -> u32 {
        self.row().1
    }

    /// Most descriptors that may come with it.
    pub fn most_fds(self) -> usize {
        self.row().2
    }

    fn row(self) -> &'static (Request, u32, usize) {
        &REQUESTS[self as usize]
    }
}

/// A message's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What is asked.
    pub request: Request,
    /// Whether an answer is wanted where none is defined ([`feature::REPLY_ACK`]).
    pub need_reply: bool,
    /// Bytes of the payload, at most [`MAX_PAYLOAD`].
    pub len: usize,
}

impl Header {
    /// Reads a front end's header.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Header, Fault> {
        let [number, flags, len] = [0, 4, 8].map(|at| u32::from_ne_bytes([0, 1, 2, 3].map(|byte| bytes[at + byte])));
        if flags & flag::VERSION_MASK != flag::VERSION || flags & flag::REPLY != 0 {
            return Err(Fault::Flags(flags));
        }
        let known = REQUESTS.iter().find(|row| row.1 == number).ok_or(Fault::Unknown(number))?;
        let len = usize::try_from(len).ok().filter(|&len| len <= MAX_PAYLOAD).ok_or(Fault::Size(known.0))?;
        Ok(Header { request: known.0, need_reply: flags & flag::NEED_REPLY != 0, len })
    }
}

/// The header of a reply with `len` bytes of payload.
pub fn reply_header(request: Request, len: usize) -> [u8; HEADER_LEN] {
    header(request.number(), flag::VERSION | flag::REPLY, len)
}

/// The header of a front end's message with `len` bytes of payload, to which no answer is wanted.
pub fn request_header(request: Request, len: usize) -> [u8; HEADER_LEN] {
    header(request.number(), flag::VERSION, len)
}

/// The header of a message on the back end's channel, without payload and without an answer.
pub fn backend_header(number: u32) -> [u8; HEADER_LEN] {
    header(number, flag::VERSION, 0)
}

fn header(number: u32, flags: u32, len: usize) -> [u8; HEADER_LEN] {
    let len = u32::try_from(len).unwrap_or(u32::MAX);
    let mut bytes = [0; HEADER_LEN];
    for (at, word) in [number, flags, len].into_iter().enumerate() {
        bytes[at * 4..at * 4 + 4].copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}

/// Why a front end is hung up on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The wrong version, or a reply.
    Flags(u32),
    /// A request that a block device does not know.
    Unknown(u32),
    /// A payload of a wrong size or content.
    Size(Request),
    /// Too few or too many descriptors, or descriptors of the wrong kind.
    Descriptors(Request),
    /// A queue that there is not.
    Queue(Request, u32),
    /// A size, address or position that a queue cannot have, or not now.
    Ring(Request, &'static str),
    /// Memory that cannot be had or is described wrongly.
    Memory(Request, &'static str),
    /// Features that were not offered.
    Features(Request, u64),
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Fault::Flags(flags) => write!(f, "a message with flags {flags:#x}, which no front end sends"),
            Fault::Unknown(number) => write!(f, "request {number} is unknown to a block device"),
            Fault::Size(request) => write!(f, "{request:?} with a wrong payload"),
            Fault::Descriptors(request) => write!(f, "{request:?} with wrong descriptors"),
            Fault::Queue(request, index) => write!(f, "{request:?} for queue {index}, which there is not"),
            Fault::Ring(request, what) | Fault::Memory(request, what) => write!(f, "{request:?}: {what}"),
            Fault::Features(request, extra) => write!(f, "{request:?} with bits {extra:#x}, which were not offered"),
        }
    }
}

/// A message with its payload; its descriptors are kept beside it.
#[derive(Clone, Debug)]
pub struct Payload<'a> {
    request: Request,
    bytes: &'a [u8],
}

/// "Vring addresses": in the front end's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Of the descriptor table.
    pub descriptors: u64,
    /// Of the used ring.
    pub used: u64,
    /// Of the available ring.
    pub available: u64,
}

/// "Memory region".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionAt {
    /// Where the guest sees it.
    pub guest: u64,
    /// Bytes.
    pub len: u64,
    /// Where the front end sees it.
    pub user: u64,
    /// Where it begins in the file.
    pub offset: u64,
}

/// "Inflight description".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InflightAt {
    /// Bytes of the area.
    pub len: u64,
    /// Where it begins in the file.
    pub offset: u64,
    /// Queues it is for.
    pub queues: u16,
    /// Descriptors of each.
    pub queue_size: u16,
}

impl<'a> Payload<'a> {
    /// A payload as it came.
    pub fn new(request: Request, bytes: &'a [u8]) -> Payload<'a> {
        Payload { request, bytes }
    }

    fn fault(&self) -> Fault {
        Fault::Size(self.request)
    }

    fn u16(&self, at: usize) -> Result<u16, Fault> {
        let bytes = self.bytes.get(at..).and_then(|rest| rest.first_chunk()).ok_or(self.fault())?;
        Ok(u16::from_ne_bytes(*bytes))
    }

    fn u32(&self, at: usize) -> Result<u32, Fault> {
        let bytes = self.bytes.get(at..).and_then(|rest| rest.first_chunk()).ok_or(self.fault())?;
        Ok(u32::from_ne_bytes(*bytes))
    }

    fn u64(&self, at: usize) -> Result<u64, Fault> {
        let bytes = self.bytes.get(at..).and_then(|rest| rest.first_chunk()).ok_or(self.fault())?;
        Ok(u64::from_ne_bytes(*bytes))
    }

    fn exactly(&self, len: usize) -> Result<(), Fault> {
        if self.bytes.len() == len { Ok(()) } else { Err(self.fault()) }
    }

    /// Nothing.
    ///
    /// # Errors
    /// There is something.
    pub fn empty(&self) -> Result<(), Fault> {
        self.exactly(0)
    }

    /// One number.
    ///
    /// # Errors
    /// Another size, as everywhere here.
    pub fn number(&self) -> Result<u64, Fault> {
        self.exactly(8)?;
        self.u64(0)
    }

    /// A queue and a number.
    ///
    /// # Errors
    /// As [`Payload::number`].
    pub fn queue_state(&self) -> Result<(u32, u32), Fault> {
        self.exactly(8)?;
        Ok((self.u32(0)?, self.u32(4)?))
    }

    /// A queue, and whether a descriptor belongs to the message.
    ///
    /// # Errors
    /// As [`Payload::number`], and unknown bits.
    pub fn queue_fd(&self) -> Result<(u32, bool), Fault> {
        let number = self.number()?;
        if number & !0x1ff != 0 {
            return Err(self.fault());
        }
        Ok(((number & 0xff) as u32, number & 0x100 == 0))
    }

    /// A queue and where its parts are. Its `flags` would ask for a log of writes, which is not offered.
    ///
    /// # Errors
    /// As [`Payload::number`].
    pub fn addresses(&self) -> Result<(u32, Addresses), Fault> {
        self.exactly(40)?;
        if self.u32(4)? != 0 {
            return Err(self.fault());
        }
        let addresses = Addresses { descriptors: self.u64(8)?, used: self.u64(16)?, available: self.u64(24)? };
        Ok((self.u32(0)?, addresses))
    }

    /// A table of regions, in order.
    ///
    /// # Errors
    /// As [`Payload::number`], none or more than [`MAX_REGIONS`].
    pub fn regions(&self) -> Result<Vec<RegionAt>, Fault> {
        let count = usize::try_from(self.u32(0)?).map_err(|_| self.fault())?;
        if count == 0 || count > MAX_REGIONS {
            return Err(Fault::Memory(self.request, "a table must have 1 to 32 regions"));
        }
        self.exactly(8 + count * 32)?;
        (0..count).map(|index| self.region_at(8 + index * 32)).collect()
    }

    /// A single region.
    ///
    /// # Errors
    /// As [`Payload::number`].
    pub fn region(&self) -> Result<RegionAt, Fault> {
        self.exactly(40)?;
        self.region_at(8)
    }

    fn region_at(&self, at: usize) -> Result<RegionAt, Fault> {
        let (guest, len) = (self.u64(at)?, self.u64(at + 8)?);
        Ok(RegionAt { guest, len, user: self.u64(at + 16)?, offset: self.u64(at + 24)? })
    }

    /// A part of configuration space: where, how long, and the bytes.
    ///
    /// # Errors
    /// As [`Payload::number`], and a part beyond [`MAX_CONFIG`].
    pub fn config(&self) -> Result<(usize, usize, &'a [u8]), Fault> {
        let at = |at| self.u32(at).and_then(|number| usize::try_from(number).map_err(|_| self.fault()));
        let (offset, len) = (at(0)?, at(4)?);
        self.u32(8)?;
        let bytes = &self.bytes[12..];
        if bytes.len() != len || offset > MAX_CONFIG || len > MAX_CONFIG - offset {
            return Err(self.fault());
        }
        Ok((offset, len, bytes))
    }

    /// A description of in-flight memory. With or without the padding that a C structure has at its end.
    ///
    /// # Errors
    /// As [`Payload::number`].
    pub fn inflight(&self) -> Result<InflightAt, Fault> {
        if self.bytes.len() != 20 && self.bytes.len() != 24 {
            return Err(self.fault());
        }
        let (len, offset) = (self.u64(0)?, self.u64(8)?);
        Ok(InflightAt { len, offset, queues: self.u16(16)?, queue_size: self.u16(18)? })
    }

    /// The bytes as they came.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }
}

impl InflightAt {
    /// As a payload of `len` bytes, 20 or 24.
    pub fn to_bytes(self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(24);
        bytes.extend(self.len.to_ne_bytes());
        bytes.extend(self.offset.to_ne_bytes());
        bytes.extend(self.queues.to_ne_bytes());
        bytes.extend(self.queue_size.to_ne_bytes());
        bytes.resize(len, 0);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_stands_in_its_row() {
        for (index, row) in REQUESTS.iter().enumerate() {
            assert_eq!(row.0 as usize, index);
            assert_eq!(row.0.number(), row.1);
        }
    }

    #[test]
    fn a_header_of_another_version_a_reply_or_an_unknown_request_is_refused() {
        let with = |number, flags, len| Header::parse(&header(number, flags, len));
        assert_eq!(with(1, 0x9, 0), Ok(Header { request: Request::GetFeatures, need_reply: true, len: 0 }));
        assert_eq!(with(1, 0x0, 0), Err(Fault::Flags(0)));
        assert_eq!(with(1, 0x5, 0), Err(Fault::Flags(5)));
        assert_eq!(with(6, 0x1, 0), Err(Fault::Unknown(6)));
        assert_eq!(with(5, 0x1, 4097), Err(Fault::Size(Request::SetMemTable)));
    }

    #[test]
    fn a_part_of_configuration_space_stays_within_it() {
        let part = |offset: u32, len: u32, bytes: usize| {
            let mut payload = Vec::new();
            payload.extend([offset, len, 0].map(u32::to_ne_bytes).as_flattened());
            payload.resize(12 + bytes, 0);
            Payload::new(Request::GetConfig, &payload).config().is_ok()
        };
        assert!(part(0, 256, 256) && part(200, 56, 56));
        assert!(!part(0, 257, 257) && !part(200, 57, 57) && !part(257, 0, 0) && !part(u32::MAX, u32::MAX, 4));
        assert!(!part(0, 8, 7));
    }
}
