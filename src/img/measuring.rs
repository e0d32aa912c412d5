// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The verb that measures how fast an image is: `bench`.

use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use clap::Args;
use manager::opening::Rights;

use super::images::{Cache, Common, bytes};

#[derive(Args)]
pub struct Bench {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    cache: Cache,
    /// The image's format.
    #[arg(short, long)]
    format: Option<String>,
    /// Requests.
    #[arg(short, long, default_value = "75000")]
    count: String,
    /// Requests at once, 1 to 1024.
    #[arg(short, long, default_value = "64")]
    depth: String,
    /// Where the first request begins.
    #[arg(short, long, value_parser = bytes, default_value = "0")]
    offset: u64,
    /// Bytes of a request.
    #[arg(short = 's', long, value_parser = bytes, default_value = "4096")]
    buffer_size: u64,
    /// Bytes from the beginning of a request to that of the next; by default those of a request.
    #[arg(short = 'S', long, value_parser = bytes)]
    step_size: Option<u64>,
    /// `threads`.
    #[arg(short = 'i', long)]
    aio: Option<String>,
    /// Not supported.
    #[arg(short, long)]
    native: bool,
    /// Write, in place of reading.
    #[arg(short, long)]
    write: bool,
    /// The byte that is written.
    #[arg(long)]
    pattern: Option<String>,
    /// A flush after so many writes.
    #[arg(long)]
    flush_interval: Option<u64>,
    /// A flush does not wait for the writes before it.
    #[arg(long)]
    no_drain: bool,
    image: PathBuf,
}

pub fn bench(verb: Bench) -> anyhow::Result<u8> {
    let common = &verb.common;
    let number = |text: &str, what: &str, most: u64| {
        let number = text.parse::<u64>().ok().filter(|number| *number <= most);
        number.with_context(|| format!("Invalid {what} specified: '{text}'."))
    };
    let count = number(&verb.count, "request count", u32::MAX.into())?;
    let depth = number(&verb.depth, "queue depth", 1024)?.max(1);
    match verb.aio.as_deref() {
        None | Some("threads") if !verb.native => {}
        None | Some("threads" | "native" | "io_uring") => bail!("requests go through threads alone in this version"),
        Some(other) => bail!("Invalid aio option: {other}"),
    }
    let pattern = match verb.pattern.as_deref().map(str::parse::<u8>) {
        None => 0,
        Some(Ok(byte)) => byte,
        Some(Err(_)) => bail!("Invalid pattern byte specified. Must be between 0 and 255."),
    };
    let flush_interval = verb.flush_interval.unwrap_or(0);
    ensure!(verb.write || flush_interval == 0, "--flush-interval is only available in write tests");
    ensure!(flush_interval == 0 || flush_interval >= depth, "Flush interval can't be smaller than depth");
    ensure!(
        (1..=1 << 30).contains(&verb.buffer_size),
        "Invalid buffer size specified. Must be between 1 and 1073741824."
    );
    let rights = if verb.write { Rights::ReadWrite } else { Rights::ReadOnly };
    let asked = common.asked(&verb.image, verb.format.as_deref())?.direct(verb.cache.is_direct());
    common.check_share(&asked, rights)?;
    Ok(::img::bench::run(::img::bench::Request {
        layers: common.layers_of(&asked, rights)?,
        count,
        depth: usize::try_from(depth)?,
        size: usize::try_from(verb.buffer_size)?,
        offset: verb.offset,
        step: verb.step_size.filter(|step| *step > 0).unwrap_or(verb.buffer_size),
        pattern: verb.write.then_some(pattern),
        flush_interval,
        drains: !verb.no_drain,
        force_share: common.force_share,
        confinement: common.requirement(),
    })?)
}
