//! Interrupts of a device: eventfds that QEMU hands over.
//!
//! A vector without an eventfd is pending, as a masked one is, and is raised when it gets one. The line
//! is level-triggered and masks itself when it is raised, as VFIO has it.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::vfio::{INTX, IRQS, MSIX, set};

/// What QEMU has handed over.
#[derive(Debug)]
pub(crate) struct Interrupts {
    vectors: Vec<Option<File>>,
    pending: Vec<bool>,
    line: Option<File>,
    line_masked: bool,
    /// The guest has MSI-X on, perhaps without any vector yet.
    msix: bool,
    /// Eventfds that were written to.
    pub raised: u64,
}

fn signal(file: &File) {
    // A counter that is full interrupts as well; what is no eventfd is the client's own loss.
    let mut file = file;
    let _ = file.write(&1u64.to_ne_bytes());
}

impl Interrupts {
    pub(crate) fn new(vectors: u16) -> Self {
        Self {
            vectors: (0..vectors).map(|_| None).collect(),
            pending: vec![false; vectors.into()],
            line: None,
            line_masked: false,
            msix: false,
            raised: 0,
        }
    }

    /// The vectors that QEMU has handed an eventfd over for.
    pub(crate) fn connected(&self) -> usize {
        self.vectors.iter().flatten().count()
    }

    /// What QEMU has handed over: the bodies of messages that say the same, and their files.
    pub(crate) fn handed_over(&self) -> Vec<(Vec<u8>, Option<BorrowedFd<'_>>)> {
        let body = |index: u32, start: u32| {
            let words = [20, set::EVENTFD | set::TRIGGER, index, start, 1];
            words.iter().flat_map(|word: &u32| word.to_le_bytes()).collect()
        };
        let line = self.line.iter().map(|file| (body(INTX, 0), Some(file.as_fd())));
        // Also where no vector has one: MSI-X is on.
        let on = self.msix.then(|| (body(MSIX, 0), None));
        let vectors = self.vectors.iter().enumerate().filter_map(|(at, file)| {
            file.as_ref().map(|file| (body(MSIX, at as u32), Some(file.as_fd())))
        });
        line.chain(on).chain(vectors).collect()
    }

    /// SET_IRQS.
    ///
    /// # Errors
    /// An errno; nothing has changed.
    pub(crate) fn set(
        &mut self,
        (index, flags): (u32, u32),
        (start, count): (u32, u32),
        files: Vec<OwnedFd>,
    ) -> Result<(), i32> {
        if index >= IRQS {
            return Err(libc::EINVAL);
        }
        match (index, flags & (set::MASK | set::UNMASK | set::TRIGGER)) {
            (INTX, set::MASK) => self.line_masked = true,
            (INTX, set::UNMASK) => self.line_masked = false,
            (INTX, set::TRIGGER) if flags & set::EVENTFD != 0 => {
                (self.line, self.line_masked) = (files.into_iter().next().map(File::from), false);
            }
            (INTX, set::TRIGGER) if flags & set::NONE != 0 && count == 0 => self.line = None,
            (MSIX, set::TRIGGER) => return self.set_vectors(flags, (start, count), files),
            // Errors and requests: there are none to tell of.
            _ => {}
        }
        Ok(())
    }

    fn set_vectors(
        &mut self,
        flags: u32,
        (start, count): (u32, u32),
        files: Vec<OwnedFd>,
    ) -> Result<(), i32> {
        if flags & set::EVENTFD == 0 {
            if flags & set::NONE != 0 && count == 0 {
                self.vectors.iter_mut().for_each(|vector| *vector = None);
                self.msix = false;
            }
            return Ok(());
        }
        let (start, count) = (start as usize, count as usize);
        let end = start.checked_add(count).filter(|end| *end <= self.vectors.len());
        let range = start..end.ok_or(libc::EINVAL)?;
        if !files.is_empty() && files.len() != count {
            return Err(libc::EINVAL);
        }
        self.msix = true;
        let mut files = files.into_iter();
        for at in range {
            self.vectors[at] = files.next().map(File::from);
            if let Some(file) = self.vectors[at].as_ref().filter(|_| self.pending[at]) {
                signal(file);
                (self.pending[at], self.raised) = (false, self.raised + 1);
            }
        }
        Ok(())
    }

    /// Of all vectors, what QEMU has handed over; none while MSI-X is off.
    pub(crate) fn vectors(&self) -> Option<&[Option<File>]> {
        self.msix.then_some(&*self.vectors)
    }

    /// Interrupts by a vector. Without MSI-X it is the line's business ([`Interrupts::follow_line`]).
    pub(crate) fn raise(&mut self, vector: u16) {
        let at = usize::from(vector);
        if !self.msix || at >= self.vectors.len() {
            return;
        }
        match &self.vectors[at] {
            Some(file) => {
                signal(file);
                self.raised += 1;
            }
            None => self.pending[at] = true,
        }
    }

    /// The line is asserted: raises it, unless it is masked.
    pub(crate) fn follow_line(&mut self, asserted: bool) {
        if self.msix || !asserted || self.line_masked {
            return;
        }
        if let Some(file) = &self.line {
            signal(file);
            (self.line_masked, self.raised) = (true, self.raised + 1);
        }
    }

    /// Bytes of the pending bits.
    pub(crate) fn pending(&self, offset: u64, into: &mut [u8]) {
        for (at, byte) in into.iter_mut().enumerate() {
            let first = offset.saturating_add(at as u64).saturating_mul(8);
            let bit = |n: u64| {
                let vector = usize::try_from(first.saturating_add(n)).unwrap_or(usize::MAX);
                u8::from(self.pending.get(vector).copied().unwrap_or(false)) << n
            };
            *byte = (0..8).map(bit).fold(0, |byte, bit| byte | bit);
        }
    }

    /// What was pending is forgotten: the device was reset.
    pub(crate) fn forget_pending(&mut self) {
        self.pending.fill(false);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::FromRawFd;

    use super::*;

    fn eventfd() -> (File, OwnedFd) {
        // SAFETY: no preconditions; a new descriptor that the file then owns.
        let file = unsafe { File::from_raw_fd(libc::eventfd(0, libc::EFD_NONBLOCK)) };
        let copy = file.try_clone().unwrap().into();
        (file, copy)
    }

    fn count(mut file: &File) -> u64 {
        let mut bytes = [0; 8];
        file.read(&mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
    }

    const VECTORS: (u32, u32) = (MSIX, set::EVENTFD | set::TRIGGER);

    #[test]
    fn a_vector_without_an_eventfd_is_pending_until_it_has_one() {
        let (file, copy) = eventfd();
        let mut interrupts = Interrupts::new(3);
        interrupts.set(VECTORS, (0, 1), Vec::new()).unwrap();
        interrupts.raise(2);
        let mut bits = [0; 2];
        interrupts.pending(0, &mut bits);
        assert_eq!(bits, [4, 0]);
        interrupts.set(VECTORS, (2, 1), vec![copy]).unwrap();
        assert_eq!(count(&file), 1);
        interrupts.pending(0, &mut bits);
        assert_eq!(bits, [0, 0]);
        interrupts.raise(2);
        assert_eq!((count(&file), interrupts.raised, interrupts.connected()), (1, 2, 1));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut interrupts = Interrupts::new(3);
        for (index, range, files) in [
            ((MSIX, VECTORS.1), (3, 1), 1),
            ((MSIX, VECTORS.1), (u32::MAX, u32::MAX), 1),
            ((MSIX, VECTORS.1), (0, 3), 1),
            ((9, VECTORS.1), (0, 1), 1),
        ] {
            let files = (0..files).map(|_| eventfd().1).collect();
            assert_eq!(interrupts.set(index, range, files), Err(libc::EINVAL));
        }
        interrupts.raise(u16::MAX);
        interrupts.pending(u64::MAX, &mut [0; 8]);
    }

    #[test]
    fn the_line_masks_itself_and_is_raised_again_while_it_is_asserted() {
        let (file, copy) = eventfd();
        let mut interrupts = Interrupts::new(3);
        interrupts.set((INTX, set::EVENTFD | set::TRIGGER), (0, 1), vec![copy]).unwrap();
        interrupts.follow_line(true);
        interrupts.follow_line(true);
        assert_eq!(count(&file), 1);
        interrupts.set((INTX, set::NONE | set::UNMASK), (0, 1), Vec::new()).unwrap();
        interrupts.follow_line(false);
        assert_eq!(count(&file), 0);
        interrupts.follow_line(true);
        assert_eq!(count(&file), 1);
        // With MSI-X on there is no line.
        interrupts.set(VECTORS, (0, 1), Vec::new()).unwrap();
        interrupts.set((INTX, set::NONE | set::UNMASK), (0, 1), Vec::new()).unwrap();
        interrupts.follow_line(true);
        assert_eq!(count(&file), 0);
    }
}
