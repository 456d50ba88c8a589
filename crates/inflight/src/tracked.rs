//! A virtqueue whose requests survive the process that serves them.
//!
//! ```text
//!             pop                    complete                publish
//!   available ───► in flight ──────────► staged ──────────────► used
//!               counter = n           used element           used.idx     ◄ the driver sees it
//!               inflight = 1          next, last_batch_head  inflight = 0 (each of the batch)
//!                                                            region.used_idx = used.idx
//! ```
//!
//! A process may die after any store. Whatever is in flight *or staged* at that instant is done
//! again by the next process; whatever is used is not. The one doubtful stretch is between the
//! store of `used.idx` and that of `region.used_idx`: there the entries of the last batch may
//! still say "in flight" although the driver has them. Recovery sees it by the two indices being
//! different, and clears as many entries along the batch's list as the difference says.

use semper_ring::{ChainError, RingError, Segment, SplitQueue};

use crate::format::{VERSION, VERSION_FRESH};
use crate::point::{Hook, Point};
use crate::region::QueueRegion;

/// Why a region cannot be recovered. Nothing was changed in it, or in the ring.
///
/// The remedy is always the same: the region does not belong to this queue or was damaged, so the
/// device must be reset (reboot the guest, or unbind and bind its driver).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecoveryError {
    /// Written by a release that this one does not know.
    #[error("the in-flight region has version {0}, and this program knows version {VERSION}")]
    Version(u16),
    /// The region is for smaller queues.
    #[error("the in-flight region has {region} entries and the queue {queue}")]
    Size {
        /// Entries of the region.
        region: u16,
        /// Size of the queue.
        queue: u16,
    },
    /// `inflight` is neither 0 nor 1, or 1 beyond the end of the queue.
    #[error("entry {head} of the in-flight region holds {value}, which no backend wrote there")]
    Entry {
        /// Which entry.
        head: u16,
        /// What it holds.
        value: u8,
    },
    /// `last_batch_head` or a `next` leads outside the region.
    #[error("the last batch of the in-flight region leads to entry {0}, which does not exist")]
    Batch(u16),
    /// The ring and the region are further apart than any batch.
    #[error(
        "the ring's used index is {ring} and the in-flight region's {region}: \
         they are not of one device"
    )]
    Indices {
        /// used.idx of the ring.
        ring: u16,
        /// used_idx of the region.
        region: u16,
    },
}

/// A [`SplitQueue`] and, where the front end supports it, its part of the in-flight region.
///
/// One thread owns it. The order of stores is the specification's; see the module.
pub struct TrackedQueue<H: Hook> {
    ring: SplitQueue,
    region: Option<QueueRegion>,
    hook: H,
    counter: u64,
    /// Which heads this process has taken and not completed: the guest may write a head into the
    /// available ring twice, and the second must not be taken for a new request.
    taken: Box<[bool]>,
    batch: Vec<u16>,
}

impl<H: Hook> TrackedQueue<H> {
    /// Joins `ring` and `region`, recovers, and gives the heads to be done again, oldest first.
    ///
    /// The caller does those before it pops anything. Without a region the queue starts at
    /// `base` (SET_VRING_BASE) and there is nothing to replay. With one, `base` is ignored: front
    /// ends disagree on what it means after a lost connection, the region knows.
    ///
    /// # Errors
    /// [`RecoveryError`]; the queue cannot be served.
    pub fn recover(
        mut ring: SplitQueue,
        region: Option<QueueRegion>,
        base: u16,
        mut hook: H,
    ) -> Result<(Self, Vec<u16>), RecoveryError> {
        let size = ring.size();
        let mut replay = Vec::new();
        let mut counter = 0;
        match &region {
            None => {
                let used = ring.published_used_idx();
                ring.resume_at(used, base.wrapping_sub(used));
            }
            Some(region) => {
                replay = recover_region(region, &ring, &mut hook)?;
                counter = replay.last().map_or(0, |&head| region.counter(head).wrapping_add(1));
                ring.resume_at(ring.published_used_idx(), replay.len() as u16);
            }
        }
        let mut taken = vec![false; usize::from(size)].into_boxed_slice();
        for &head in &replay {
            taken[usize::from(head)] = true;
        }
        let batch = Vec::with_capacity(usize::from(size));
        Ok((Self { ring, region, hook, counter, taken, batch }, replay))
    }

    /// Takes the next available request and marks it in flight.
    ///
    /// # Errors
    /// [`RingError`]: the queue must stop until the driver resets it. A head that is in flight
    /// already is [`RingError::Busy`].
    #[inline]
    pub fn pop(&mut self) -> Result<Option<u16>, RingError> {
        let Some(head) = self.ring.pop_head()? else { return Ok(None) };
        let taken = &mut self.taken[usize::from(head)];
        if *taken {
            return Err(RingError::Busy { head });
        }
        *taken = true;
        if let Some(region) = &self.region {
            self.hook.at(Point::PopStart);
            region.set_counter(head, self.counter);
            self.hook.at(Point::PopCounter);
            region.set_inflight(head, 1);
            self.hook.at(Point::PopMark);
            self.counter = self.counter.wrapping_add(1);
        }
        Ok(Some(head))
    }

    /// Hands the segments of `head` to `each`; see [`SplitQueue::walk`].
    ///
    /// # Errors
    /// [`ChainError`].
    #[inline]
    pub fn walk(&self, head: u16, each: impl FnMut(Segment)) -> Result<(), ChainError> {
        self.ring.walk(head, each)
    }

    /// The request at `head` is done and has written `written` bytes; the driver learns of it at
    /// the next [`TrackedQueue::publish`]. A head that is not in flight is ignored.
    #[inline]
    pub fn complete(&mut self, head: u16, written: u32) {
        match self.taken.get_mut(usize::from(head)) {
            Some(taken) if *taken => *taken = false,
            _ => return,
        }
        self.ring.stage_used(head, written);
        self.hook.at(Point::UsedElement);
        if let Some(region) = &self.region {
            region.set_next(head, region.last_batch_head());
            self.hook.at(Point::BatchNext);
            region.set_last_batch_head(head);
            self.hook.at(Point::BatchHead);
        }
        self.batch.push(head);
    }

    /// Shows everything completed to the driver. Does nothing when there is nothing.
    #[inline]
    pub fn publish(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        self.ring.publish_used();
        self.hook.at(Point::UsedIndex);
        if let Some(region) = &self.region {
            for &head in &self.batch {
                region.set_inflight(head, 0);
                self.hook.at(Point::ClearEntry);
            }
            region.set_used_idx(self.ring.used_idx());
            self.hook.at(Point::RegionIndex);
        }
        self.batch.clear();
    }

    /// Requests that are completed and not published.
    pub fn staged(&self) -> usize {
        self.batch.len()
    }

    /// Whether the driver wants an interrupt for what was published since the last call.
    #[inline]
    pub fn needs_call(&mut self) -> bool {
        let needed = self.ring.needs_call();
        if needed {
            self.hook.at(Point::CallPending);
        }
        needed
    }

    /// Reports that the queue's owner has come to `point` (those that are not stores of ours).
    #[inline(always)]
    pub fn passed(&mut self, point: Point) {
        self.hook.at(point);
    }

    /// The ring, for notifications and indices.
    pub fn ring(&self) -> &SplitQueue {
        &self.ring
    }

    /// The ring, for notifications.
    pub fn ring_mut(&mut self) -> &mut SplitQueue {
        &mut self.ring
    }

    /// Whether requests are tracked.
    pub fn is_tracked(&self) -> bool {
        self.region.is_some()
    }
}

/// Brings the region into step with the ring; gives the heads in flight, oldest first.
fn recover_region<H: Hook>(
    region: &QueueRegion,
    ring: &SplitQueue,
    hook: &mut H,
) -> Result<Vec<u16>, RecoveryError> {
    // A driver may use fewer entries than the device offers, so the queue may be the smaller.
    let (size, capacity) = (ring.size(), region.capacity());
    if capacity < size {
        return Err(RecoveryError::Size { region: capacity, queue: size });
    }
    let ring_idx = ring.published_used_idx();
    let fresh = match region.version() {
        VERSION_FRESH => true,
        VERSION => false,
        other => return Err(RecoveryError::Version(other)),
    };
    if !fresh && region.desc_num() != capacity {
        return Err(RecoveryError::Size { region: region.desc_num(), queue: size });
    }
    let mut replay = heads_in_flight(region, size)?;
    if fresh {
        // The ring need not be fresh: without this store the next recovery would take the whole
        // history of the ring for one unfinished batch.
        region.set_desc_num(capacity);
        region.set_used_idx(ring_idx);
        region.set_last_batch_head(0);
        region.set_version(VERSION);
    }
    hook.at(Point::RecoverStart);
    let behind = ring_idx.wrapping_sub(region.used_idx());
    if behind != 0 {
        // Check the whole list before the first store: an error must change nothing.
        let done = last_batch(region, size, behind, replay.is_empty(), ring_idx)?;
        for &head in &done {
            region.set_inflight(head, 0);
            hook.at(Point::RecoverClear);
        }
        region.set_used_idx(ring_idx);
        hook.at(Point::RecoverIndex);
        replay.retain(|head| !done.contains(head));
    }
    replay.sort_by_key(|&head| (region.counter(head), head));
    Ok(replay)
}

fn heads_in_flight(region: &QueueRegion, size: u16) -> Result<Vec<u16>, RecoveryError> {
    let mut heads = Vec::new();
    for head in 0..region.capacity() {
        match region.inflight(head) {
            0 => {}
            1 if head < size => heads.push(head),
            value => return Err(RecoveryError::Entry { head, value }),
        }
    }
    Ok(heads)
}

/// The heads of the last `behind` requests that were completed.
fn last_batch(
    region: &QueueRegion,
    size: u16,
    behind: u16,
    idle: bool,
    ring_idx: u16,
) -> Result<Vec<u16>, RecoveryError> {
    if behind > size {
        // No batch is that long. With nothing in flight the device was reset under the region
        // and there is nothing to decide; otherwise nobody can know what is done.
        return if idle {
            Ok(Vec::new())
        } else {
            Err(RecoveryError::Indices { ring: ring_idx, region: region.used_idx() })
        };
    }
    let mut heads = Vec::with_capacity(usize::from(behind));
    let mut head = region.last_batch_head();
    for _ in 0..behind {
        if head >= size {
            return Err(RecoveryError::Batch(head));
        }
        heads.push(head);
        head = region.next(head);
    }
    Ok(heads)
}
