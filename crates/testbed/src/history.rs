//! What a guest saw of its disk, and whether a legal order of its requests explains it.
//!
//! A request is *in progress* from its submission until the guest sees it completed. A disk is
//! linearisable if every request seems to take effect at one instant in between. The judges:
//!
//! * [`History::some_order_explains`]: there is an order of all requests that never puts one before
//!   another that was completed when it was submitted, and that gives every read its result and the
//!   disk its content (brute force).
//! * [`History::some_order_explains_each_block`]: the same for each block by itself. No disk
//!   promises more when power is lost or a process dies in the middle of a request: the unit that
//!   is written whole is the sector.
//! * [`History::writes_took_effect_in_order`]: the disk ends as the writes leave it when they are
//!   done in the order of submission. virtio-blk does not promise this to requests that are in
//!   progress together; a device that keeps overlapping requests apart and replays by counter does.

/// Most requests of a history.
pub(crate) const MAX_REQUESTS: usize = 8;
/// Most blocks of a disk.
pub const MAX_BLOCKS: usize = 4;

/// What a request does with its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verb {
    /// Fills them with this value, which is not 0 and differs from that of any other request.
    Write(u8),
    /// Reads them.
    Read,
}

/// One request on a disk of a few blocks, each of which holds one value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Request {
    /// What to do.
    pub verb: Verb,
    /// First block.
    pub first: usize,
    /// Number of blocks.
    pub count: usize,
}

impl Request {
    /// Fills `count` blocks from `first` on with `value`.
    pub const fn write(first: usize, count: usize, value: u8) -> Self {
        assert!(value != 0 && count > 0 && first + count <= MAX_BLOCKS);
        Self { verb: Verb::Write(value), first, count }
    }

    /// Reads `count` blocks from `first` on.
    pub const fn read(first: usize, count: usize) -> Self {
        assert!(count > 0 && first + count <= MAX_BLOCKS);
        Self { verb: Verb::Read, first, count }
    }

    /// The blocks.
    pub fn blocks(&self) -> std::ops::Range<usize> {
        self.first..self.first + self.count
    }

    /// Whether the order of the two can make a difference.
    pub fn conflicts_with(&self, other: &Request) -> bool {
        (self.verb != Verb::Read || other.verb != Verb::Read)
            && self.first < other.blocks().end
            && other.first < self.blocks().end
    }
}

/// What happened to a list of requests, as far as their guest could see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct History {
    requests: [Request; MAX_REQUESTS],
    len: usize,
    submitted: u8,
    completed: u8,
    /// For each request, the set of those that were completed when it was submitted.
    before: [u8; MAX_REQUESTS],
    /// What each read returned.
    values: [[u8; MAX_BLOCKS]; MAX_REQUESTS],
}

impl History {
    /// Nothing was submitted yet.
    ///
    /// # Panics
    /// When there are more than 8 requests.
    pub fn new(requests: &[Request]) -> Self {
        assert!(requests.len() <= MAX_REQUESTS);
        let mut all = [Request::read(0, 1); MAX_REQUESTS];
        all[..requests.len()].copy_from_slice(requests);
        Self {
            requests: all,
            len: requests.len(),
            submitted: 0,
            completed: 0,
            before: [0; MAX_REQUESTS],
            values: [[0; MAX_BLOCKS]; MAX_REQUESTS],
        }
    }

    /// The requests, in the order of submission.
    pub fn requests(&self) -> &[Request] {
        &self.requests[..self.len]
    }

    /// Request `index` is on its way.
    pub fn submit(&mut self, index: usize) {
        self.submitted |= 1 << index;
        self.before[index] = self.completed;
    }

    /// The guest sees request `index` completed; `values` are what it read.
    pub fn complete(&mut self, index: usize, values: &[u8]) {
        self.completed |= 1 << index;
        self.values[index][..values.len()].copy_from_slice(values);
    }

    /// Whether everything was submitted and completed.
    pub fn is_finished(&self) -> bool {
        let all = ((1u16 << self.len) - 1) as u8;
        self.submitted == all && self.completed == all
    }

    /// Whether an order that respects time explains all reads and the final `disk`.
    pub fn some_order_explains(&self, disk: &[u8]) -> bool {
        self.extend(0, [0; MAX_BLOCKS], disk, 0..disk.len())
    }

    /// Whether for each block there is an order that explains what was seen of that block.
    pub fn some_order_explains_each_block(&self, disk: &[u8]) -> bool {
        (0..disk.len()).all(|block| self.extend(0, [0; MAX_BLOCKS], disk, block..block + 1))
    }

    /// Whether a request can be put behind those in `done`, and then all others, such that the
    /// blocks in `judged` are explained.
    fn extend(
        &self,
        done: u8,
        now: [u8; MAX_BLOCKS],
        disk: &[u8],
        judged: std::ops::Range<usize>,
    ) -> bool {
        if done.count_ones() as usize == self.len {
            return now[judged.clone()] == disk[judged];
        }
        (0..self.len).any(|i| {
            let ready = done & (1 << i) == 0 && self.before[i] & !done == 0;
            let next = if ready { self.effect(i, now, &judged) } else { None };
            next.is_some_and(|next| self.extend(done | 1 << i, next, disk, judged.clone()))
        })
    }

    /// The disk after request `index`, or none if it saw another one in the blocks `judged`.
    fn effect(
        &self,
        index: usize,
        mut now: [u8; MAX_BLOCKS],
        judged: &std::ops::Range<usize>,
    ) -> Option<[u8; MAX_BLOCKS]> {
        let request = &self.requests[index];
        match request.verb {
            Verb::Write(value) => now[request.blocks()].fill(value),
            Verb::Read => {
                let saw = |block: usize| self.values[index][block - request.first];
                let differs = |block: usize| judged.contains(&block) && now[block] != saw(block);
                if request.blocks().any(differs) {
                    return None;
                }
            }
        }
        Some(now)
    }

    /// Whether the disk is as the writes leave it in the order of submission.
    pub fn writes_took_effect_in_order(&self, disk: &[u8]) -> bool {
        let mut now = [0; MAX_BLOCKS];
        for request in self.requests() {
            if let Verb::Write(value) = request.verb {
                now[request.blocks()].fill(value);
            }
        }
        now[..disk.len()] == *disk
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROGRAM: [Request; 3] =
        [Request::write(0, 1, 1), Request::write(0, 1, 2), Request::read(0, 1)];

    #[test]
    fn requests_in_progress_together_may_take_effect_in_any_order() {
        let mut history = History::new(&PROGRAM);
        (0..3).for_each(|i| history.submit(i));
        history.complete(0, &[]);
        history.complete(1, &[]);
        history.complete(2, &[0]);
        assert!(history.is_finished());
        assert!(history.some_order_explains(&[1]) && history.some_order_explains(&[2]));
        assert!(!history.some_order_explains(&[0]));
        assert!(history.writes_took_effect_in_order(&[2]));
        assert!(!history.writes_took_effect_in_order(&[1]));
    }

    #[test]
    fn what_was_completed_before_cannot_come_after() {
        let mut history = History::new(&PROGRAM);
        history.submit(0);
        history.complete(0, &[]);
        history.submit(1);
        history.complete(1, &[]);
        history.submit(2);
        history.complete(2, &[2]);
        assert!(history.some_order_explains(&[2]));
        assert!(!history.some_order_explains(&[1]));
    }

    #[test]
    fn an_old_write_that_comes_back_after_it_was_seen_is_found() {
        // The write of 1 is in progress all the time, is read, then overwritten, then there again.
        let program = [Request::write(0, 1, 1), Request::read(0, 1), Request::write(0, 1, 2)];
        let mut history = History::new(&program);
        history.submit(0);
        history.submit(1);
        history.complete(1, &[1]);
        history.submit(2);
        history.complete(2, &[]);
        history.complete(0, &[]);
        assert!(history.some_order_explains(&[2]));
        assert!(!history.some_order_explains(&[1]));
    }

    #[test]
    fn a_torn_write_is_found_where_requests_must_be_whole() {
        let program = [Request::write(0, 2, 1), Request::write(0, 2, 2)];
        let mut history = History::new(&program);
        (0..2).for_each(|i| history.submit(i));
        (0..2).for_each(|i| history.complete(i, &[]));
        assert!(history.some_order_explains(&[1, 1]) && history.some_order_explains(&[2, 2]));
        assert!(!history.some_order_explains(&[1, 2]));
        assert!(history.some_order_explains_each_block(&[1, 2]));
        assert!(!history.some_order_explains_each_block(&[1, 3]));
    }
}
