//! The device's features and its configuration space (VIRTIO 1.2, 5.2.3 and 5.2.4).

use semper_block::{Image, SECTOR_SIZE};

const BLK_F_SEG_MAX: u64 = 1 << 2;
const BLK_F_RO: u64 = 1 << 5;
const BLK_F_BLK_SIZE: u64 = 1 << 6;
/// The driver can flush; without it the cache must be write-through.
pub(crate) const BLK_F_FLUSH: u64 = 1 << 9;
const BLK_F_TOPOLOGY: u64 = 1 << 10;
/// The driver can switch the cache.
pub(crate) const BLK_F_CONFIG_WCE: u64 = 1 << 11;
const BLK_F_MQ: u64 = 1 << 12;
const BLK_F_DISCARD: u64 = 1 << 13;
const BLK_F_WRITE_ZEROES: u64 = 1 << 14;
/// The device can tell which pages it writes (vhost's own bit).
pub(crate) const F_LOG_ALL: u64 = 1 << 26;
const F_INDIRECT_DESC: u64 = 1 << 28;
/// Both sides say when they want to be woken.
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
/// vhost-user's own bit.
pub(crate) const F_PROTOCOL_FEATURES: u64 = 1 << 30;
const F_VERSION_1: u64 = 1 << 32;

/// Two descriptors of a chain are header and status; QEMU's own devices say the same.
const SEG_MAX: u32 = 126;
/// 1 GiB: what one request may discard or zero.
pub(crate) const MAX_TRIM_SECTORS: u32 = (1 << 30) / SECTOR_SIZE as u32;

/// Offset of the write-cache byte, the only one that a driver may write.
pub(crate) const OFFSET_WCE: u32 = 32;
/// Bytes of the capacity, which comes first.
const CAPACITY_BYTES: usize = 8;
/// Bytes of the configuration space that we fill.
pub(crate) const SIZE: usize = 60;

/// Features that the device offers.
pub(crate) fn features(image: &Image) -> u64 {
    let always = BLK_F_SEG_MAX
        | BLK_F_BLK_SIZE
        | BLK_F_TOPOLOGY
        | BLK_F_MQ
        | BLK_F_FLUSH
        | BLK_F_CONFIG_WCE
        | F_LOG_ALL
        | F_INDIRECT_DESC
        | F_EVENT_IDX
        | F_PROTOCOL_FEATURES
        | F_VERSION_1;
    always | if image.read_only() { BLK_F_RO } else { BLK_F_DISCARD | BLK_F_WRITE_ZEROES }
}

/// The configuration space.
pub(crate) fn space(image: &Image, num_queues: u16, write_back: bool) -> [u8; SIZE] {
    let mut space = [0u8; SIZE];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(image.capacity() / SECTOR_SIZE).to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &image.block_size().to_le_bytes());
    let physical_exponent = (image.physical_block_size() / image.block_size()).ilog2();
    put(24, &[physical_exponent as u8, 0]);
    put(26, &1u16.to_le_bytes());
    put(OFFSET_WCE as usize, &[u8::from(write_back)]);
    put(34, &num_queues.to_le_bytes());
    if !image.read_only() {
        put(36, &MAX_TRIM_SECTORS.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &(image.physical_block_size() / SECTOR_SIZE as u32).to_le_bytes());
        put(48, &MAX_TRIM_SECTORS.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
    }
    space
}

/// Whether a read of the configuration space shows the whole capacity.
pub(crate) fn covers_capacity(offset: u32, size: u32) -> bool {
    offset == 0 && size as usize >= CAPACITY_BYTES
}
