//! What the source keeps until the destination has answered: pages that went out as references.

use std::collections::VecDeque;

use crate::format::{self, Kind, MAX_REPAIRS, MIN_CHARGE, Reader, WireError};
use crate::index::BlockRef;
use crate::{PAGE_SIZE, Page};

/// What a batch of a piece of the stream is charged, in bytes.
pub(crate) fn charge(stream_len: usize) -> u64 {
    MIN_CHARGE.max(stream_len as u64)
}

/// The pages of one batch that went out as references.
#[derive(Debug)]
pub struct Held {
    pub(crate) batch: u32,
    pub(crate) refs: Vec<BlockRef>,
    pub(crate) pages: Vec<u8>,
}

/// All pages whose verdict is outstanding, by batch. The [`Window`] bounds them.
#[derive(Debug, Default)]
pub struct Ledger(VecDeque<Held>);

/// What a verdict asks for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Repairs {
    /// REPAIR frames, to be sent at once.
    pub frames: Vec<Vec<u8>>,
    /// Blocks that had another content, and the one that they should have had.
    pub mismatched: Vec<(BlockRef, Page)>,
}

impl Ledger {
    /// Before the batch is sent.
    pub fn hold(&mut self, held: Held) {
        self.0.push_back(held);
    }

    /// Nothing is outstanding.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes of pages that are kept.
    pub fn held_bytes(&self) -> u64 {
        self.0.iter().map(|held| held.pages.len() as u64).sum()
    }

    /// The payload of a VERDICT: lets the batch go, with the bytes of what did not match.
    ///
    /// # Errors
    /// A verdict that is not about the oldest batch, or about references that it has not.
    pub fn verdict(&mut self, payload: &[u8]) -> Result<Repairs, WireError> {
        let mut reader = Reader(payload);
        let (batch, count) = (reader.u32()?, reader.u32()? as usize);
        let held = self.0.pop_front().filter(|held| held.batch == batch);
        let held = held.ok_or(WireError::Protocol("a verdict out of turn"))?;
        if count > held.refs.len() || reader.0.len() != count * 4 {
            return Err(WireError::Protocol("a verdict of a wrong length"));
        }
        let mut bad = Vec::with_capacity(count);
        for _ in 0..count {
            let at = reader.u32()?;
            if at as usize >= held.refs.len() || bad.last().is_some_and(|&last| last >= at) {
                return Err(WireError::Protocol("a verdict on what was not referred to"));
            }
            bad.push(at);
        }
        let frames = bad.chunks(MAX_REPAIRS).map(|bad| held.repair(bad)).collect();
        let mismatch = |&at: &u32| {
            let page = held.pages.get(at as usize * PAGE_SIZE..)?.first_chunk()?;
            Some((*held.refs.get(at as usize)?, *page))
        };
        Ok(Repairs { frames, mismatched: bad.iter().filter_map(mismatch).collect() })
    }
}

impl Held {
    fn repair(&self, bad: &[u32]) -> Vec<u8> {
        let mut frame = format::begin(Kind::Repair);
        frame.extend_from_slice(&self.batch.to_le_bytes());
        frame.extend_from_slice(&(bad.len() as u32).to_le_bytes());
        bad.iter().for_each(|at| frame.extend_from_slice(&at.to_le_bytes()));
        for &at in bad {
            let start = at as usize * PAGE_SIZE;
            frame.extend_from_slice(&self.pages[start..start + PAGE_SIZE]);
        }
        format::finish(frame)
    }
}
