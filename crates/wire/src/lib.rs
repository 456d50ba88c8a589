//! The wire between two hosts while a VM moves: QEMU's migration stream, with every page that
//! equals a block of a shared disk replaced by a reference of some twenty bytes.
//!
//! ```text
//!   QEMU ─bytes─► Parser ─items─► Encoder ─drafts─► Packer ─BATCH─► …TLS… ─► Decoder ─bytes─► QEMU
//!                           │ PageIndex: content -> block               │ Disks: reads the block
//!                           ▼                                           ▼
//!                         Ledger ◄────────────── VERDICT ─────────── verified, or named
//!                           └─────────────────── REPAIR ───────────► the bytes themselves
//! ```
//!
//! Method: US20200371827A1, the half that uses the association of pages and blocks. What comes out
//! is byte for byte what went in ([`Encoder`], [`Decoder`]); a part of the stream that cannot be
//! understood passes through unchanged ([`Parser`]). A reference is never believed: it carries a
//! keyed BLAKE3 hash of the page, the destination hashes the block that it has read, and the source
//! keeps the page until it is told that they agree ([`Ledger`]).
//!
//! Nothing here opens a socket or a disk. The format is drawn in [`format`](mod@format) and in
//! `docs/reference/wire-format.md`; the design is in `docs/design/wire.md`.

mod batch;
mod decoder;
mod draft;
mod encoder;
pub mod format;
mod handshake;
mod index;
mod ledger;
mod link;
mod stream;
#[doc(hidden)]
pub mod synthetic;
mod trust;
mod varint;
mod window;

pub use decoder::{Decoded, Decoder, Disks, Judged};
pub use draft::{Batch, Draft, Packer};
pub use encoder::{Counters, Encoder, EncoderOptions};
pub use format::{Frame, Hello, Kind, Role, WireError};
pub use handshake::{Agreement, OfferedDisk, Ready, Start, agree};
pub use index::{BlockRef, ContentIndex, Fingerprint, Fingerprinter, NoIndex, PageIndex};
pub use ledger::{Held, Ledger, Repairs};
pub use link::LinkRate;
pub use stream::{MAX_ITEM, Parser, Sink};
pub use window::Window;

/// Bytes of a page of the guest and of a block of a disk.
pub const PAGE_SIZE: usize = 4096;

/// A page's content.
pub type Page = [u8; PAGE_SIZE];

/// The first half of a keyed BLAKE3 hash.
pub type Hash = [u8; 16];

/// The hash that a reference carries.
pub fn hash_page(key: &[u8; 32], page: &Page) -> Hash {
    let mut hash = [0; 16];
    hash.copy_from_slice(&blake3::keyed_hash(key, page).as_bytes()[..16]);
    hash
}
