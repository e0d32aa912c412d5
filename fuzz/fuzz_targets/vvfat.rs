// SPDX-License-Identifier: Apache-2.0 OR MIT
#![no_main]

#[path = "../../tests/fuzzed/mod.rs"]
mod fuzzed;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzzed::vvfat(data));
