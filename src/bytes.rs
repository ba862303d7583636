// SPDX-License-Identifier: GPL-2.0-only
//! The shared structs as bytes, for sockets, maps and BPF_PROG_RUN.

use std::mem::size_of;

use crate::shared_abi::{umcg_admin_args, umcg_cell, umcg_header, umcg_hello, umcg_stats, umcg_welcome};

/// A struct that is nothing but its bytes.
///
/// # Safety
///
/// The type is `repr(C)`, has no padding, and every pattern of bits is a value of it.
pub(crate) unsafe trait Bytes: Copy {
    /// The bytes of this value.
    fn as_bytes(&self) -> &[u8] {
        // SAFETY: without padding all size_of::<Self>() bytes are initialised, and the borrow of self
        // keeps them in place and unchanged.
        unsafe { std::slice::from_raw_parts((&raw const *self).cast(), size_of::<Self>()) }
    }

    /// The bytes of this value, to be overwritten with whatever.
    fn as_bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, the borrow is exclusive, and every pattern of bits is a value.
        unsafe { std::slice::from_raw_parts_mut((&raw mut *self).cast(), size_of::<Self>()) }
    }

    /// The value with these bytes; `None` if their number is wrong.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        // SAFETY: the slice is as long as Self, every pattern of bits is a value, and the read does not
        // ask for alignment.
        (bytes.len() == size_of::<Self>()).then(|| unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
    }
}

// SAFETY: repr(C), integers only; src/shared_abi.rs asserts sizes that leave no room for padding.
unsafe impl Bytes for umcg_admin_args {}
// SAFETY: as above.
unsafe impl Bytes for umcg_cell {}
// SAFETY: as above.
unsafe impl Bytes for umcg_header {}
// SAFETY: as above.
unsafe impl Bytes for umcg_hello {}
// SAFETY: as above.
unsafe impl Bytes for umcg_stats {}
// SAFETY: as above.
unsafe impl Bytes for umcg_welcome {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_of_the_wrong_length_is_no_hello() {
        let hello = umcg_hello { magic: 1, abi_version: 2, max_tasks: 3, reserved: 0 };
        let bytes = hello.as_bytes();
        assert_eq!(umcg_hello::from_bytes(bytes).unwrap().max_tasks, 3);
        assert!(umcg_hello::from_bytes(&bytes[..15]).is_none());
        assert!(umcg_hello::from_bytes(&[bytes, &[0]].concat()).is_none());
        assert!(umcg_hello::from_bytes(&[]).is_none());
    }
}
