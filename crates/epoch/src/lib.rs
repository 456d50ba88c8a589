//! The epoch record: what an image itself knows about who may write it.
//!
//! `src/sempervirt/store/epoch.py` draws the layout and says why there is one;
//! `docs/design/ownership.md` says when a backend looks at it. [`record`] is pure, [`file`] reads
//! and writes.

pub mod file;
pub mod record;

pub use crate::file::{
    Denied, admit, admit_confirmed, check_unclaimed, confirm, lock, make, new_id, read,
    record_path, release, set_layered,
};
pub use crate::record::{Admission, Claim, Holder, Id, Record};
