// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The C library's allocator.

/// Lets the allocator have at most `most` arenas, now. Left alone it decides when many threads allocate at once, and older
/// libraries open a file in `/sys` for that. Nothing happens in a C library other than glibc.
pub fn limit_arenas(most: usize) {
    #[cfg(target_env = "gnu")]
    {
        let most = libc::c_int::try_from(most).unwrap_or(libc::c_int::MAX);
        // SAFETY: mallopt takes the allocator's own lock and only sets a number in it.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, most) };
    }
    #[cfg(not(target_env = "gnu"))]
    let _ = most;
}
