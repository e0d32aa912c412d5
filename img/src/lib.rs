// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Image verbs. Every parse of an image happens in a process that has confined itself first.

pub mod inspect;
