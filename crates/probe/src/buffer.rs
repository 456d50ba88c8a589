//! Memory that O_DIRECT accepts: aligned to a page.

/// Alignment and granule of every buffer.
const PAGE: usize = 4096;

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

/// A zeroed buffer whose start is aligned to 4096 bytes.
pub struct Buffer {
    pages: Vec<Page>,
    length: usize,
}

impl Buffer {
    /// `length` bytes of zeroes.
    pub fn new(length: usize) -> Self {
        Self { pages: vec![Page([0; PAGE]); length.div_ceil(PAGE)], length }
    }
}

impl std::ops::Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the pages are one contiguous allocation of at least `length` initialised bytes,
        // a Page has no padding, and the borrow of self keeps them alive and unchanged.
        unsafe { std::slice::from_raw_parts(self.pages.as_ptr().cast(), self.length) }
    }
}

impl std::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in deref, and the exclusive borrow of self makes the slice exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.pages.as_mut_ptr().cast(), self.length) }
    }
}

#[cfg(test)]
mod tests {
    use super::Buffer;

    #[test]
    fn a_buffer_is_aligned_and_exact() {
        let mut buffer = Buffer::new(5000);
        assert_eq!(buffer.len(), 5000);
        assert_eq!(buffer.as_ptr() as usize % 4096, 0);
        buffer[4999] = 1;
        assert_eq!(buffer.iter().filter(|byte| **byte == 0).count(), 4999);
    }
}
