//! Between the thread that reads QEMU's stream and the one that sends: hashing and packing, by
//! several threads at once, in and out in order.
//!
//! ```text
//!   push ─► drafts ─► packing threads ─► slots, one for each draft, in order ─► pop
//! ```
//!
//! How much is in it is bounded by the window: room is taken before a draft is pushed.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use semper_wire::{Batch, Draft, Packer};

/// A batch and its charge.
pub(crate) type Charged = (u64, Batch);

#[derive(Default)]
struct State {
    drafts: VecDeque<(u64, Draft)>,
    /// From number `first` on; none where a thread still works on it.
    slots: VecDeque<Option<Charged>>,
    first: u64,
    ended: bool,
}

#[derive(Default)]
pub(crate) struct Pipeline {
    state: Mutex<State>,
    /// There is a draft, or there will be no more.
    work: Condvar,
    /// The first slot is full, or there will be no more.
    packed: Condvar,
}

impl Pipeline {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn push(&self, draft: Draft) {
        let mut state = self.state();
        let number = state.first + state.slots.len() as u64;
        state.slots.push_back(None);
        state.drafts.push_back((number, draft));
        drop(state);
        self.work.notify_one();
    }

    /// Nothing is pushed any longer; what was comes out still.
    pub(crate) fn end(&self) {
        self.state().ended = true;
        self.work.notify_all();
        self.packed.notify_all();
    }

    /// Nothing comes out any longer.
    pub(crate) fn abandon(&self) {
        let mut state = self.state();
        state.drafts.clear();
        state.slots.clear();
        drop(state);
        self.end();
    }

    /// Packs until the end.
    pub(crate) fn work(&self, mut packer: Packer) {
        let mut state = self.state();
        loop {
            let Some((number, draft)) = state.drafts.pop_front() else {
                if state.ended {
                    return;
                }
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(state);
            let packed = (draft.charge(), packer.pack(draft));
            state = self.state();
            let at = number.checked_sub(state.first).and_then(|at| usize::try_from(at).ok());
            // What was abandoned has no slot.
            if let Some(slot) = at.and_then(|at| state.slots.get_mut(at)) {
                *slot = Some(packed);
            }
            if at == Some(0) {
                self.packed.notify_one();
            }
        }
    }

    /// The next batch; none at the end.
    pub(crate) fn pop(&self) -> Option<Charged> {
        let mut state = self.state();
        loop {
            match state.slots.front_mut().map(Option::take) {
                Some(Some(packed)) => {
                    state.slots.pop_front();
                    state.first += 1;
                    return Some(packed);
                }
                None if state.ended => return None,
                _ => state = self.packed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use semper_wire::synthetic::{KEY, Stream, prose};
    use semper_wire::{Encoder, EncoderOptions, NoIndex};

    use super::*;

    #[test]
    fn what_several_threads_pack_comes_out_in_order() {
        let options = EncoderOptions { batch_pages: 4, ..EncoderOptions::new(KEY, vec![]) };
        let pipeline = Pipeline::default();
        let ids = thread::scope(|scope| {
            for _ in 0..4 {
                let packer = options.packer().unwrap();
                scope.spawn(|| pipeline.work(packer));
            }
            let ids = scope.spawn(|| {
                let batches = std::iter::from_fn(|| pipeline.pop());
                batches.map(|(_, batch)| batch.frame()[8]).collect::<Vec<_>>()
            });
            let mut encoder = Encoder::new(NoIndex, options.clone());
            let mut stream = Stream::begin(1 << 16);
            stream.part();
            (0..800).for_each(|number| stream.page(number, &prose(number)));
            encoder.feed(&stream.bytes);
            encoder.flush();
            std::iter::from_fn(|| encoder.pop()).for_each(|draft| pipeline.push(draft));
            pipeline.end();
            ids.join().unwrap()
        });
        assert!(ids.len() >= 200 && (0..).zip(&ids).all(|(n, &id)| n % 256 == usize::from(id)));
    }

    #[test]
    fn an_abandoned_pipeline_ends() {
        let pipeline = Pipeline::default();
        let mut encoder = Encoder::new(NoIndex, EncoderOptions::new(KEY, vec![]));
        encoder.feed(&Stream::begin(1).bytes);
        encoder.flush();
        pipeline.push(encoder.pop().unwrap());
        pipeline.abandon();
        assert!(pipeline.pop().is_none());
        pipeline.work(EncoderOptions::new(KEY, vec![]).packer().unwrap());
    }
}
