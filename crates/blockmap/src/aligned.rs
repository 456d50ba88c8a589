//! Page-sized memory at a page's alignment: what direct I/O wants.

use crate::PAGE_SIZE;

/// One page of bytes, page-aligned.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C, align(4096))]
pub struct Page(pub [u8; PAGE_SIZE]);

impl Default for Page {
    fn default() -> Self {
        Self([0; PAGE_SIZE])
    }
}

impl Page {
    /// The bytes of a run of pages.
    pub fn bytes_mut(pages: &mut [Page]) -> &mut [u8] {
        let len = std::mem::size_of_val(pages);
        // SAFETY: a Page is exactly PAGE_SIZE plain bytes without padding.
        unsafe { std::slice::from_raw_parts_mut(pages.as_mut_ptr().cast(), len) }
    }

    /// Whether every byte is zero.
    pub fn is_zero(&self) -> bool {
        self.0.iter().all(|&byte| byte == 0)
    }
}
