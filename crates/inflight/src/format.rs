//! The in-flight region: its layout, its version, its sizes.
//!
//! The backend creates the region (GET_INFLIGHT_FD), the front end keeps it and gives it back at
//! every start (SET_INFLIGHT_FD). It therefore outlives any backend process and is read by other
//! releases of this program: **offsets never change under one version number**.
//!
//! ```text
//!   region      queue 0 │ queue 1 │ … │ queue n-1 │ device record
//!               each queue is queue_stride(size) bytes, the device record DEVICE_RECORD_SIZE
//!
//!   queue       0  features        u64   0; reserved by the specification
//!               8  version         u16   0 = fresh (zeroed memory), 1 = this layout
//!              10  desc_num        u16   number of entries = queue size
//!              12  last_batch_head u16   head of the list of the last batch that was completed
//!              14  used_idx        u16   the ring's used.idx when the last batch was done
//!              16  entry[desc_num]
//!
//!   entry       0  inflight        u8    1 = taken from the ring, not completed
//!               1  padding         5 bytes
//!               6  next            u16   next entry in the list of the batch
//!               8  counter         u64   order in which requests were taken; replay follows it
//!
//!   device      0  magic           u32   "SVd1"; anything else = absent
//!   record      4  write_through   u8    1 = the guest has set the cache to write-through
//!               5  postcopy        u8    1 = memory of the guest was still arriving; good
//!                                        without the magic
//!               6  flush_failed    u8    1 = a flush has failed, and every later one has to fail;
//!                                        good without the magic
//!               7  padding         to DEVICE_RECORD_SIZE
//! ```
//!
//! The queue part is the vhost-user specification's `QueueRegionSplit`. The device record is ours:
//! the front end tells a backend once that the guest switched its write cache, and would not tell
//! the next one; a backend that fell back to write-back would break the guest's promise to itself.
//! The region is the one place that reaches the next process atomically with the requests.
//!
//! Version rule: a reader that meets a version it does not know refuses the region by name; it
//! never guesses. 0 is never written.

/// `version` of zeroed memory.
pub const VERSION_FRESH: u16 = 0;
/// `version` of the layout drawn above.
pub const VERSION: u16 = 1;

/// Offset of `version` in a queue's part.
pub const OFFSET_VERSION: usize = 8;
/// Offset of `desc_num`.
pub const OFFSET_DESC_NUM: usize = 10;
/// Offset of `last_batch_head`.
pub const OFFSET_LAST_BATCH_HEAD: usize = 12;
/// Offset of `used_idx`.
pub const OFFSET_USED_IDX: usize = 14;
/// Bytes before the first entry.
pub const HEADER_SIZE: usize = 16;

/// Bytes of one entry.
pub const ENTRY_SIZE: usize = 16;
/// Offset of `inflight` in an entry.
pub const ENTRY_INFLIGHT: usize = 0;
/// Offset of `next` in an entry.
pub const ENTRY_NEXT: usize = 6;
/// Offset of `counter` in an entry.
pub const ENTRY_COUNTER: usize = 8;

/// Bytes of the device record.
pub const DEVICE_RECORD_SIZE: usize = 64;
/// First bytes of a device record that is there.
pub const DEVICE_MAGIC: u32 = u32::from_le_bytes(*b"SVd1");
/// Offset of `write_through` in the device record.
pub const DEVICE_WRITE_THROUGH: usize = 4;

/// Offset of `postcopy` in the device record.
pub const DEVICE_POSTCOPY: usize = 5;
/// Offset of `flush_failed` in the device record.
pub const DEVICE_FLUSH_FAILED: usize = 6;

/// Queues start on a cache line of their own: their threads must not share one.
const ALIGNMENT: usize = 64;

/// Bytes from one queue's part to the next, for queues of `desc_num` entries.
pub const fn queue_stride(desc_num: u16) -> usize {
    (HEADER_SIZE + ENTRY_SIZE * desc_num as usize).next_multiple_of(ALIGNMENT)
}

/// Bytes of a whole region.
pub const fn region_size(num_queues: u16, desc_num: u16) -> usize {
    queue_stride(desc_num) * num_queues as usize + DEVICE_RECORD_SIZE
}
