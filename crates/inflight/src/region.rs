//! Raw access to one queue's part of the region, and to the device record.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use crate::format::{
    DEVICE_FLUSH_FAILED, DEVICE_MAGIC, DEVICE_POSTCOPY, DEVICE_RECORD_SIZE, DEVICE_WRITE_THROUGH,
    ENTRY_COUNTER, ENTRY_INFLIGHT, ENTRY_NEXT, ENTRY_SIZE, HEADER_SIZE, OFFSET_DESC_NUM,
    OFFSET_LAST_BATCH_HEAD, OFFSET_USED_IDX, OFFSET_VERSION, queue_stride,
};

/// One queue's part of the region.
///
/// Another process (the front end) has the same memory mapped, and an earlier backend wrote it:
/// whatever is read is checked by the caller. Stores are atomic with release order, so that they
/// reach memory in program order and a process that dies leaves a prefix of them.
pub struct QueueRegion {
    base: *mut u8,
    desc_num: u16,
}

// SAFETY: the pointer leads into a shared mapping that the creator keeps alive (see `new`); all
// access is atomic.
unsafe impl Send for QueueRegion {}

impl QueueRegion {
    /// The part at `base`, with `desc_num` entries.
    ///
    /// # Safety
    /// `base` must be 8-aligned and valid for reads and writes of `queue_stride(desc_num)` bytes
    /// for as long as the value lives, in memory that is only ever accessed atomically.
    pub unsafe fn new(base: *mut u8, desc_num: u16) -> Self {
        debug_assert!(base.addr() % 8 == 0 && queue_stride(desc_num) >= HEADER_SIZE);
        Self { base, desc_num }
    }

    /// Number of entries that the memory has room for.
    pub fn capacity(&self) -> u16 {
        self.desc_num
    }

    pub(crate) fn version(&self) -> u16 {
        self.u16_at(OFFSET_VERSION).load(Ordering::Acquire)
    }

    pub(crate) fn set_version(&self, value: u16) {
        self.u16_at(OFFSET_VERSION).store(value, Ordering::Release);
    }

    pub(crate) fn desc_num(&self) -> u16 {
        self.u16_at(OFFSET_DESC_NUM).load(Ordering::Acquire)
    }

    pub(crate) fn set_desc_num(&self, value: u16) {
        self.u16_at(OFFSET_DESC_NUM).store(value, Ordering::Release);
    }

    pub(crate) fn last_batch_head(&self) -> u16 {
        self.u16_at(OFFSET_LAST_BATCH_HEAD).load(Ordering::Acquire)
    }

    pub(crate) fn set_last_batch_head(&self, value: u16) {
        self.u16_at(OFFSET_LAST_BATCH_HEAD).store(value, Ordering::Release);
    }

    pub(crate) fn used_idx(&self) -> u16 {
        self.u16_at(OFFSET_USED_IDX).load(Ordering::Acquire)
    }

    pub(crate) fn set_used_idx(&self, value: u16) {
        self.u16_at(OFFSET_USED_IDX).store(value, Ordering::Release);
    }

    pub(crate) fn inflight(&self, head: u16) -> u8 {
        self.entry_u8(head).load(Ordering::Acquire)
    }

    pub(crate) fn set_inflight(&self, head: u16, value: u8) {
        self.entry_u8(head).store(value, Ordering::Release);
    }

    pub(crate) fn next(&self, head: u16) -> u16 {
        self.u16_at(self.entry(head) + ENTRY_NEXT).load(Ordering::Acquire)
    }

    pub(crate) fn set_next(&self, head: u16, value: u16) {
        self.u16_at(self.entry(head) + ENTRY_NEXT).store(value, Ordering::Release);
    }

    pub(crate) fn counter(&self, head: u16) -> u64 {
        self.entry_u64(head).load(Ordering::Acquire)
    }

    pub(crate) fn set_counter(&self, head: u16, value: u64) {
        self.entry_u64(head).store(value, Ordering::Release);
    }

    #[inline]
    fn entry(&self, head: u16) -> usize {
        // The one bounds check of this file; callers pass heads that the ring has checked against
        // a queue size that equals desc_num, so the branch is never taken.
        assert!(head < self.desc_num, "entry {head} of {}", self.desc_num);
        HEADER_SIZE + ENTRY_SIZE * usize::from(head)
    }

    #[inline]
    fn u16_at(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: all offsets are even and inside the part (`new`, `entry`).
        unsafe { AtomicU16::from_ptr(self.base.add(offset).cast()) }
    }

    #[inline]
    fn entry_u8(&self, head: u16) -> &AtomicU8 {
        // SAFETY: inside the part (`new`, `entry`).
        unsafe { AtomicU8::from_ptr(self.base.add(self.entry(head) + ENTRY_INFLIGHT)) }
    }

    #[inline]
    fn entry_u64(&self, head: u16) -> &AtomicU64 {
        // SAFETY: inside the part, and 8-aligned because base, header and entries are.
        unsafe { AtomicU64::from_ptr(self.base.add(self.entry(head) + ENTRY_COUNTER).cast()) }
    }
}

/// What the next backend must know of the device beside its requests.
pub struct DeviceRecord {
    base: *mut u8,
}

// SAFETY: as for `QueueRegion`.
unsafe impl Send for DeviceRecord {}

impl DeviceRecord {
    /// The record at `base`.
    ///
    /// # Safety
    /// As for [`QueueRegion::new`], with [`DEVICE_RECORD_SIZE`] bytes.
    pub unsafe fn new(base: *mut u8) -> Self {
        debug_assert!(base.addr() % 8 == 0 && DEVICE_RECORD_SIZE >= 8);
        Self { base }
    }

    /// Whether the guest has set its cache to write-through; `None` if nobody recorded anything.
    pub fn write_through(&self) -> Option<bool> {
        (self.magic().load(Ordering::Acquire) == DEVICE_MAGIC)
            .then(|| self.flag(DEVICE_WRITE_THROUGH).load(Ordering::Acquire) != 0)
    }

    /// Records the guest's choice, before it is acknowledged to the front end.
    pub fn set_write_through(&self, value: bool) {
        self.flag(DEVICE_WRITE_THROUGH).store(u8::from(value), Ordering::Release);
        self.magic().store(DEVICE_MAGIC, Ordering::Release);
    }

    /// Whether memory of the guest was still arriving when it was last told.
    pub fn postcopy(&self) -> bool {
        self.flag(DEVICE_POSTCOPY).load(Ordering::Acquire) != 0
    }

    /// Records it, before the first page can be missing or after the last.
    pub fn set_postcopy(&self, value: bool) {
        self.flag(DEVICE_POSTCOPY).store(u8::from(value), Ordering::Release);
    }

    /// Whether a flush has failed.
    pub fn flush_failed(&self) -> bool {
        self.flag(DEVICE_FLUSH_FAILED).load(Ordering::Acquire) != 0
    }

    /// Records that, before the guest is told.
    pub fn set_flush_failed(&self) {
        self.flag(DEVICE_FLUSH_FAILED).store(1, Ordering::Release);
    }

    fn magic(&self) -> &AtomicU32 {
        // SAFETY: inside the record and aligned (`new`).
        unsafe { AtomicU32::from_ptr(self.base.cast()) }
    }

    fn flag(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: inside the record (`new`, and the offsets of `format`).
        unsafe { AtomicU8::from_ptr(self.base.add(offset)) }
    }
}
