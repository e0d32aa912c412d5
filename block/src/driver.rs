// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an open image of any format answers: [`Driver`], and the words that it is asked and answers in.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use rustix::io::Errno;
use sys::file::Wait;

use crate::bitmap::Bitmaps;
use crate::claims::Demand;
use crate::encryption::Encryption;
use crate::gate::Hold;
use crate::host::Descriptor;
use crate::located::HostFile;
use crate::snapshot::Snapshots;
use crate::vvfat::Vvfat;
use crate::{BlockNode, Error, Preallocation, Result};

/// How exactly [`Driver::map`] should answer, and whether it may sleep to find out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// How exact.
    pub detail: Detail,
    /// Whether metadata that is not in memory may be read from a device that makes the caller wait.
    pub wait: Wait,
}

/// How exactly [`Driver::map`] should answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// For reading: any place from which the right bytes can be read. Holes of host files need not be found.
    Place,
    /// For block status: holes are looked for (`lseek(SEEK_DATA)`), data of a layer is told from data below it.
    Allocation,
}

/// Where the bytes at an offset live, and for how many bytes that holds.
#[derive(Debug)]
pub struct Mapping<'a> {
    /// Where.
    pub target: Target<'a>,
    /// For how many bytes from the asked offset: at least 1, at most what was asked.
    pub len: u64,
    /// Keep it until the I/O on `target` is done: as long, the place belongs to nobody else.
    pub hold: Hold<'a>,
}

impl<'a> Mapping<'a> {
    /// A mapping whose place never changes hands.
    pub fn fixed(target: Target<'a>, len: u64) -> Mapping<'a> {
        Mapping { target, len, hold: Hold::NONE }
    }
}

/// Where bytes live.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// At `offset` of a host file or device. Past its end they are zeroes.
    Fd {
        /// The file.
        fd: BorrowedFd<'a>,
        /// Byte offset in it.
        offset: u64,
    },
    /// This layer's own data, stored at `offset` of another node. Past that node's end they are zeroes.
    Data {
        /// The node that stores them.
        node: &'a BlockNode,
        /// Byte offset in it.
        offset: u64,
    },
    /// This layer's own data, stored encrypted at `offset` of another node.
    Encrypted {
        /// The node that stores them.
        node: &'a BlockNode,
        /// Byte offset in it.
        offset: u64,
        /// What turns them into bytes and back.
        encryption: &'a Encryption,
    },
    /// Not this layer's business: whatever `node` says about `offset` (a backing file; a pass-through driver).
    /// Past that node's end they are zeroes.
    Child {
        /// The node to ask.
        node: &'a BlockNode,
        /// Byte offset in it.
        offset: u64,
    },
    /// They read as zeroes and take no room.
    Zero,
    /// Neither this layer nor one below it has anything stored there: they read as zeroes.
    Absent,
    /// They must be computed: [`Driver::read_computed`].
    Computed,
}

/// Room for new bytes. They are the image's content once [`Prepared::commit`] has returned; a value that is dropped before
/// gives new room back, and the content is what it was (unless the bytes went over old ones in place).
pub struct Prepared<'a> {
    /// Where to write: `Fd`, `Data` or `Encrypted`, or `Computed` for [`Driver::write_computed`].
    pub target: Target<'a>,
    /// For how many bytes: at least 1, at most what was asked.
    pub len: u64,
    /// As in [`Mapping`].
    pub hold: Hold<'a>,
    /// What makes new room part of the image; `None` for an overwrite in place.
    pub pending: Option<Box<dyn Pending + 'a>>,
}

/// New room that is not part of the image yet. Dropping it gives the room back.
pub trait Pending {
    /// Makes the bytes in the room the image's content. They have been written before.
    ///
    /// # Errors
    /// `EIO` and friends for metadata: then the content is what it was.
    fn commit(self: Box<Self>) -> io::Result<()>;
}

impl<'a> Prepared<'a> {
    /// An overwrite in place of what never changes hands.
    pub fn in_place(target: Target<'a>, len: u64) -> Prepared<'a> {
        Prepared { target, len, hold: Hold::NONE, pending: None }
    }

    /// Makes the bytes that were written to `target` the image's content.
    ///
    /// # Errors
    /// Those of [`Pending::commit`].
    pub fn commit(self) -> io::Result<()> {
        self.pending.map_or(Ok(()), Pending::commit)
    }
}

impl std::fmt::Debug for Prepared<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared")
            .field("target", &self.target)
            .field("len", &self.len)
            .field("new", &self.pending.is_some())
            .finish()
    }
}

/// How zeroes may be written (QEMU's `BDRV_REQ_MAY_UNMAP` and `BDRV_REQ_NO_FALLBACK`; NBD proto.md, "`NBD_CMD_WRITE_ZEROES`").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroFlags {
    /// The range may be deallocated.
    pub may_unmap: bool,
    /// Answer `EOPNOTSUPP` at once rather than write zeroes as data.
    pub fast_only: bool,
}

/// What a driver tells about its image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Info {
    /// Whether the image was not closed properly.
    pub dirty: bool,
    /// Whether what is stored is encrypted.
    pub encrypted: bool,
    /// Bytes that the host file takes, where that is known.
    pub allocated_size: Option<u64>,
    /// Cluster size in bytes, if the format has clusters.
    pub cluster_size: Option<u64>,
    /// The backing file's name as it stands in the image: untrusted text, never opened.
    pub backing_name: Option<String>,
    /// The backing file's format as it stands in the image: untrusted text.
    pub backing_format: Option<String>,
    /// What the image is known by to those made over it, for formats with UUIDs.
    pub uuid: Option<[u8; 16]>,
    /// The external data file's name as it stands in the image: untrusted text, never opened.
    pub data_file_name: Option<String>,
    /// Further facts for people and QMP, in order: QEMU's member name and its value.
    pub specifics: Vec<(&'static str, InfoValue)>,
}

/// A fact about an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InfoValue {
    /// True or false.
    Bool(bool),
    /// A number.
    Int(u64),
    /// Text; untrusted if it came from the image.
    Str(String),
    /// Several.
    List(Vec<InfoValue>),
    /// Further ones, by QEMU's member names.
    Map(Vec<(&'static str, InfoValue)>),
}

impl InfoValue {
    /// Text that is given as a reference.
    pub(crate) fn text(text: &str) -> InfoValue {
        InfoValue::Str(text.to_owned())
    }
}

/// An open image. Offsets are bytes of the guest's view, below [`Driver::len`]; [`BlockNode`] has checked them.
/// Every method may be called from any thread at any time.
#[allow(clippy::len_without_is_empty, reason = "an empty disk is not a special case")]
pub trait Driver: Send + Sync {
    /// Size of the guest's view in bytes.
    fn len(&self) -> u64;

    /// Where the bytes from `offset` live. `len` is at least 1 and ends within [`Driver::len`].
    ///
    /// # Errors
    /// `WouldBlock` only if `ask.wait` forbids sleeping; `EIO` for metadata that breaks the format's rules.
    fn map(&self, offset: u64, len: u64, ask: Ask) -> io::Result<Mapping<'_>>;

    /// Fills `buf` from `offset`; the range was mapped [`Target::Computed`].
    ///
    /// # Errors
    /// `EIO` if the stored form cannot be turned into bytes.
    fn read_computed(&self, _buf: &mut [u8], _offset: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Room for a write of `len` bytes at `offset`.
    ///
    /// # Errors
    /// `ENOSPC`, `EROFS`, or `EIO` for broken metadata.
    fn prepare_write(&self, offset: u64, len: u64) -> io::Result<Prepared<'_>>;

    /// Stores `buf` at `offset`; the range was prepared as [`Target::Computed`], and is committed afterwards.
    ///
    /// # Errors
    /// The errno of the layer below.
    fn write_computed(&self, _buf: &[u8], _offset: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Stores one whole cluster (or what is left of the last one) compressed, at an offset where a cluster begins.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for formats that have no such thing; else as a write.
    fn write_compressed(&self, _buf: &[u8], _offset: u64) -> io::Result<()> {
        Err(Errno::OPNOTSUPP.into())
    }

    /// Bytes of the smallest unit that [`Driver::write_zeroes`] and [`Driver::discard`] can change: a power of two.
    /// [`BlockNode`] asks them for whole units only, except at the end of the image.
    fn zero_unit(&self) -> u64 {
        1
    }

    /// Makes a range of whole [units](Driver::zero_unit) read as zeroes.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if that would mean writing data: [`BlockNode`] then writes zeroes itself, unless `flags.fast_only`.
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()>;

    /// A hint that a range of whole [units](Driver::zero_unit) is of no further use. Success promises nothing.
    ///
    /// # Errors
    /// Those of the host file; a layer that cannot discard answers success.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Returns when everything acknowledged before is on stable storage.
    ///
    /// # Errors
    /// `EIO` and friends: then nothing is known about unflushed data.
    fn flush(&self) -> io::Result<()>;

    /// Whether everything that tells where bytes live is on stable storage. If not, a write in place that must last needs a
    /// flush: after a crash its place would not be found.
    fn is_settled(&self) -> bool {
        true
    }

    /// Whether a write that passes the end makes the image longer, as it does for a regular file.
    fn grows(&self) -> bool {
        false
    }

    /// Makes the image `len` bytes long. What is beyond goes, what is new reads as zeroes.
    ///
    /// # Errors
    /// `Unsupported` for formats and images that have one size for ever; `Invalid` for a size that cannot be; `Io`.
    fn resize(&self, _len: u64, _preallocation: Preallocation) -> Result<()> {
        Err(Error::unsupported("Image format driver does not support resize"))
    }

    /// Forgets everything that this layer has, so that all of it is what the backing file has.
    ///
    /// # Errors
    /// `Unsupported` for formats and images that cannot; `Io`.
    fn empty(&self) -> Result<()> {
        Err(Error::unsupported("this image cannot be emptied"))
    }

    /// The snapshots that the image keeps, for formats that can.
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        None
    }

    /// The node's bitmaps, for a format that can store them in the image.
    fn bitmaps(&self) -> Option<&Arc<Bitmaps>> {
        None
    }

    /// The directory that it shows as a disk.
    fn directory(&self) -> Option<&Vvfat> {
        None
    }

    /// Whether one more bitmap, of this name and granularity, can be stored in the image.
    ///
    /// # Errors
    /// It cannot: QEMU's words.
    fn check_new_bitmap(&self, _name: &str, _granularity_bits: u32) -> Result<()> {
        Err(Error::unsupported("Cannot store dirty bitmaps"))
    }

    /// Takes a bitmap out of the image, if it stands there.
    ///
    /// # Errors
    /// The image is read-only; `Io`.
    fn remove_stored_bitmap(&self, _name: &str) -> Result<()> {
        Ok(())
    }

    /// Brings the image in order for its end or for reading only: nothing that is in memory alone is lost, and marks of being in
    /// use are taken away. No request is under way that writes.
    ///
    /// # Errors
    /// As [`Driver::flush`].
    fn close(&self) -> io::Result<()> {
        self.flush()
    }

    /// The same for another process that goes on with the same open files at once, and finds in the host's cache what is not on
    /// disk: what is in memory alone is written, but nobody waits for the disk without need.
    ///
    /// # Errors
    /// As [`Driver::close`].
    fn hand_over(&self) -> io::Result<()> {
        self.close()
    }

    /// Whether the image may be written from now on. Called before the nodes below become writable, after they became
    /// read-only, and with no request under way that writes.
    ///
    /// # Errors
    /// The driver cannot write, or not this image.
    fn reopen(&self, _writable: bool) -> Result<()> {
        Ok(())
    }

    /// Takes another descriptor of the same file in use, for drivers with [`crate::DriverEntry::takes_descriptor`]; requests under way
    /// end on the old one. Returns the old one.
    ///
    /// # Errors
    /// The driver takes no descriptor, or the process has no number left.
    fn replace(&self, _descriptor: Descriptor) -> Result<Descriptor> {
        Err(Error::invalid("this driver takes no descriptor"))
    }

    /// Whether [`Driver::attach`] can put another node at `edge`.
    fn attaches(&self, _edge: &str) -> bool {
        false
    }

    /// Puts a node at an edge, where there is none or in the place of one with the same bytes in it. No request is under way that
    /// would pass the edge.
    fn attach(&self, _edge: &str, _node: Arc<BlockNode>) {}

    /// Takes another socket to the same server's export in use, for drivers with an option of [`crate::OptionKind::Socket`].
    ///
    /// # Errors
    /// The driver takes no socket, or nothing that fits is behind it; then nothing has changed.
    fn reconnect(&self, _socket: Descriptor) -> Result<()> {
        Err(Error::invalid("this driver takes no socket"))
    }

    /// Takes the image locks that fit what the node's users do, and gives back the others.
    ///
    /// # Errors
    /// Another program holds the image in a way that excludes it: QEMU's words.
    fn lock(&self, _demand: Demand) -> Result<()> {
        Ok(())
    }

    /// Smallest unit of requests in bytes that the layer below takes without read-modify-write: a power of two.
    fn block_size(&self) -> u32 {
        1
    }

    /// The file behind it, if its bytes are the node's and others may read them there ([`BlockNode::locate`]).
    fn host_file(&self) -> Option<HostFile<'_>> {
        None
    }

    /// Whether reads and writes of its data wait for the device, because the file below was opened with `O_DIRECT`.
    fn bypasses_cache(&self) -> bool {
        false
    }

    /// Whether it is no layer of its own, and shows what its child stores: `raw`.
    fn passes_on(&self) -> bool {
        false
    }

    /// Facts about the image.
    fn info(&self) -> Info {
        Info::default()
    }
}
